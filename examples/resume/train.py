"""Train as examples/fashion-mnist-numpy does, and go on where an earlier run ended.

A checkpoint has all that the next step depends on: weights, momentum, and the state
of the random numbers. So a run that was killed and one that was not end with the
same weights, bit for bit.
"""
import gzip
import hashlib
import io
import json
import os
import struct
import time

import numpy as np

DATA, MODEL, CHECKPOINTS = "/inputs/data", "/inputs/model/model.safetensors", "/checkpoints"
RESUME = os.path.join(CHECKPOINTS, "resume")
STEPS, EVERY = int(os.environ.get("STEPS", "60")), int(os.environ.get("EVERY", "10"))
PAUSE = float(os.environ.get("PAUSE", "0"))
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


def save(step, weights, velocity, rng):
    """Write a checkpoint. The rename seals it, all of it or none."""
    name = os.path.join(CHECKPOINTS, "step-%d" % step)
    os.mkdir(name + ".tmp")
    for file, tensors in (("weights.npz", weights), ("velocity.npz", velocity)):
        b = io.BytesIO()
        np.savez(b, **tensors)
        with open(os.path.join(name + ".tmp", file), "wb") as f:
            f.write(b.getvalue())
    with open(os.path.join(name + ".tmp", "state.json"), "w") as f:
        json.dump({"step": step, "rng": rng.bit_generator.state}, f)
    os.rename(name + ".tmp", name)


def restore(rng):
    """Read the checkpoint that this run goes on from."""
    tensors = [dict(np.load(os.path.join(RESUME, f))) for f in ("weights.npz", "velocity.npz")]
    state = json.load(open(os.path.join(RESUME, "state.json")))
    rng.bit_generator.state = state["rng"]
    return tensors[0], tensors[1], state["step"]


def main():
    x = (idx("train-images-idx3-ubyte.gz")[:20000].reshape(-1, 784) / np.float32(255)).astype(np.float32)
    y = idx("train-labels-idx1-ubyte.gz")[:20000]
    rng, done = np.random.default_rng(1), 0
    if os.path.isdir(RESUME):
        p, velocity, done = restore(rng)
    else:
        p = load(MODEL)
        velocity = {k: np.zeros_like(v) for k, v in p.items()}
    print(json.dumps({"begins after step": done}), flush=True)
    rows = np.arange(BATCH)
    for step in range(done + 1, STEPS + 1):
        batch = rng.integers(0, len(x), BATCH)
        a, b = x[batch], y[batch]
        h = np.maximum(a @ p["w1"] + p["b1"], 0)
        z = h @ p["w2"] + p["b2"]
        z -= z.max(1, keepdims=True)
        q = np.exp(z)
        q /= q.sum(1, keepdims=True)
        loss = -float(np.log(q[rows, b] + 1e-9).mean())
        q[rows, b] -= 1
        q /= BATCH
        dh = (q @ p["w2"].T) * (h > 0)
        for k, g in (("w1", a.T @ dh), ("b1", dh.sum(0)), ("w2", h.T @ q), ("b2", q.sum(0))):
            velocity[k] = MOMENTUM * velocity[k] - RATE * g
            p[k] = p[k] + velocity[k]
        time.sleep(PAUSE)
        if step % EVERY == 0:
            save(step, p, velocity, rng)
            print(json.dumps({"checkpoint": "step-%d" % step, "loss": round(loss, 6)}), flush=True)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(p[k]).tobytes() for k in sorted(p))).hexdigest()
    print(json.dumps({"steps": STEPS, "weights": digest}), flush=True)


main()
