"""Train a small network on Fashion-MNIST from sealed weights, with numpy.

Inputs appear as plain files under /inputs, opened in memory by the job's holder.
What is renamed from NAME.tmp to NAME under /checkpoints is sealed as one unit.
"""
import gzip
import json
import os
import struct

import numpy as np

DATA, MODEL, CHECKPOINTS = "/inputs/data", "/inputs/model/model.safetensors", "/checkpoints"
EPOCHS = int(os.environ.get("EPOCHS", "1"))
BATCH, RATE, MOMENTUM = 128, np.float32(0.05), np.float32(0.9)


def idx(name):
    """Read an IDX file: a big-endian header, then bytes."""
    raw = gzip.open(os.path.join(DATA, name)).read()
    shape = struct.unpack(">%dI" % raw[3], raw[4 : 4 + 4 * raw[3]])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(path):
    """Read a safetensors file of float32 tensors."""
    raw = open(path, "rb").read()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    out = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        out[name] = np.frombuffer(raw, np.float32, (end - begin) // 4, 8 + n + begin).reshape(t["shape"]).copy()
    return out


def save(path, tensors):
    """Write a safetensors file."""
    header, offset = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    h = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(h)) + h)
        for t in tensors.values():
            f.write(np.ascontiguousarray(t).tobytes())


def main():
    x = (idx("train-images-idx3-ubyte.gz").reshape(-1, 784) / np.float32(255)).astype(np.float32)
    y = idx("train-labels-idx1-ubyte.gz")
    xt = (idx("t10k-images-idx3-ubyte.gz").reshape(-1, 784) / np.float32(255)).astype(np.float32)
    yt = idx("t10k-labels-idx1-ubyte.gz")
    p = load(MODEL)
    velocity = {k: np.zeros_like(v) for k, v in p.items()}
    rng = np.random.default_rng(1)
    rows = np.arange(BATCH)
    for epoch in range(1, EPOCHS + 1):
        order, total, steps = rng.permutation(len(x)), 0.0, len(x) // BATCH
        for i in range(steps):
            batch = order[i * BATCH : (i + 1) * BATCH]
            a, b = x[batch], y[batch]
            h = np.maximum(a @ p["w1"] + p["b1"], 0)
            z = h @ p["w2"] + p["b2"]
            z -= z.max(1, keepdims=True)
            q = np.exp(z)
            q /= q.sum(1, keepdims=True)
            total -= float(np.log(q[rows, b] + 1e-9).mean())
            q[rows, b] -= 1
            q /= BATCH
            dh = (q @ p["w2"].T) * (h > 0)
            for k, g in (("w1", a.T @ dh), ("b1", dh.sum(0)), ("w2", h.T @ q), ("b2", q.sum(0))):
                velocity[k] = MOMENTUM * velocity[k] - RATE * g
                p[k] += velocity[k]
        accuracy = float(((np.maximum(xt @ p["w1"] + p["b1"], 0) @ p["w2"] + p["b2"]).argmax(1) == yt).mean())
        print(json.dumps({"epoch": epoch, "loss": round(total / steps, 4), "accuracy": accuracy}), flush=True)
        tmp = os.path.join(CHECKPOINTS, "epoch-%d.tmp" % epoch)
        os.mkdir(tmp)
        save(os.path.join(tmp, "model.safetensors"), p)
        os.rename(tmp, tmp[: -len(".tmp")])


main()
