#!/usr/bin/env python3
"""Reads a sealed folder (docs/formats/sealed.md), for who holds its data key.

usage: sealed_reader.py FOLDER ASSET-DIGEST OUT < KEY-IN-HEX
needs python3-cryptography; shares no code with coffer.
"""
import base64, hashlib, hmac, json, os, sys
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER, PAYLOAD, TAG = 96, 4096, 16

def hkdf(secret, salt, info):  # RFC 5869, one block of output
    prk = hmac.digest(salt, secret, "sha256")
    return hmac.digest(prk, info + b"\x01", "sha256")

def want(ok, what):
    if not ok:
        sys.exit(f"refused: {what}")

def commitment(key, b):
    return hmac.digest(key, b"coffer sealed v1 commitment\0" + b, "sha256")

def canonical(v):  # RFC 8785, as far as strings and integers need it
    return json.dumps(v, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

def open_manifest(folder, digest, data_key):
    with open(os.path.join(folder, "manifest.json"), "rb") as f:
        raw = f.read()
    want("sha384:" + hashlib.sha384(raw).hexdigest() == digest, "another manifest")
    m = json.loads(raw)
    want(m["version"] == "coffer.run/sealed/v1", "unknown version")
    private = {k: base64.b64decode(v) for k, v in m.pop("private").items()}
    public = canonical(m)
    key = hkdf(data_key, private["salt"], b"coffer sealed v1 manifest\0")
    want(hmac.compare_digest(commitment(key, private["salt"] + public), private["commitment"]), "another key")
    entries = json.loads(AESGCM(key).decrypt(bytes(12), private["ciphertext"], public))["files"]
    want(len(entries) == len(m["files"]), "names and files differ in number")
    return m, entries

def chunks(path, data_key, chunk_size, salt):
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        block = f.read(PAYLOAD)
        h = block[:HEADER]
        want(h[:16] == b"coffer sealed v1" and len(block) == PAYLOAD, "not a sealed file")
        want(not any(h[20:32]) and not any(block[HEADER:]), "bytes that must be zero are not")
        want(int.from_bytes(h[16:20], "big") == chunk_size and h[32:64] == salt, "another file")
        key = hkdf(data_key, h[32:64], b"coffer sealed v1 file\0" + h[:32])
        want(hmac.compare_digest(commitment(key, h[:64]), h[64:]), "another key")
        gcm, n = AESGCM(key), -(-(size - PAYLOAD) // (chunk_size + TAG))
        for i in range(n):
            nonce = bytes(3) + i.to_bytes(8, "big") + bytes([i == n - 1])
            yield gcm.decrypt(nonce, f.read(chunk_size + TAG), h)

def main():
    folder, digest, out = sys.argv[1:]
    data_key = bytes.fromhex(sys.stdin.read().strip())
    m, entries = open_manifest(folder, digest, data_key)
    for public, e in zip(m["files"], entries):
        want(not any(c in ("", ".", "..") for c in e["name"].split("/")), "a name that leaves its folder")
        dst = os.path.join(out, e["name"])
        os.makedirs(os.path.dirname(dst), exist_ok=True)
        path = os.path.join(folder, public["id"] + ".sealed")
        want(os.path.getsize(path) == public["cipherSize"], "a file of another length")
        with open(dst, "xb") as f:
            for c in chunks(path, data_key, m["chunkSize"], base64.b64decode(e["salt"])):
                f.write(c)

try:
    main()
except InvalidTag:
    sys.exit("refused: does not authenticate")
