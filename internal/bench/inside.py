# Measures inside a job's sandbox what the job sees (inside_test.go). Prints one
# line: MEASURED and, under each name, the seconds of every round.
import json, mmap, os, socket, sys, time
import numpy

part, rounds = sys.argv[1], int(sys.argv[2])
PIECE = 1 << 20

def region():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect("/run/coffer/regions.sock")
        s.sendall(json.dumps({"version": "coffer.run/regions/v1", "open": "w/f"}).encode())
        reply, fds, _, _ = socket.recv_fds(s, 4096, 1)
    if not fds:
        raise OSError(reply)
    return fds[0]

def mapped(open_file):
    fd = open_file()
    began = time.monotonic()
    m = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    a = numpy.frombuffer(m, "<u8")
    total = a.sum()
    took = time.monotonic() - began
    del a
    m.close()
    os.close(fd)
    assert total == 0
    return took

def read(path):
    fd = os.open(path, os.O_RDONLY)
    buf = mmap.mmap(-1, PIECE)
    began, at = time.monotonic(), 0
    while n := os.preadv(fd, [buf], at):
        at += n
    took = time.monotonic() - began
    os.close(fd)
    assert at == os.stat(path).st_size
    return took

def plain():
    return os.open("/plain/f", os.O_RDONLY)

out = {}
def note(name, value):
    out.setdefault(name, []).append(value)

if part == "step":
    # The first step: every weight is used once.
    fd = os.open("/inputs/f", os.O_RDONLY)
    w = numpy.frombuffer(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ), "<f4").reshape(-1, 8192)
    y = w @ numpy.ones(8192, "f4")
    assert not y.any()
    note("ended", time.time())
elif part != "nothing":
    for i in range(rounds + 1):
        r = {}
        if part == "reads":
            r["plainMap"], r["regionMap"] = mapped(plain), mapped(region)
        r["plainRead"], r["pathRead"] = read("/plain/f"), read("/inputs/f")
        # The first round warms caches, and is dropped.
        for name, took in r.items():
            if i:
                note(name, took)
print("MEASURED " + json.dumps(out), flush=True)
