"""Train a small CNN on Fashion-MNIST from sealed weights, with PyTorch.

Inputs appear as plain files under /inputs, opened in memory by the job's holder.
What is renamed from NAME.tmp to NAME under /checkpoints is sealed as one unit.
"""
import gzip
import json
import os
import struct

import torch
import torch.nn.functional as F
from torch import nn

DATA, MODEL, CHECKPOINTS = "/inputs/data", "/inputs/model/model.safetensors", "/checkpoints"
EPOCHS = int(os.environ.get("EPOCHS", "2"))
STEPS = int(os.environ.get("STEPS", "1000"))  # at most so many batches in an epoch
BATCH = 128


def idx(name):
    """Read an IDX file: a big-endian header, then bytes."""
    raw = gzip.open(os.path.join(DATA, name)).read()
    shape = struct.unpack(">%dI" % raw[3], raw[4 : 4 + 4 * raw[3]])
    return torch.frombuffer(bytearray(raw[4 + 4 * raw[3] :]), dtype=torch.uint8).reshape(shape)


def load(path):
    """Read a safetensors file of float32 tensors."""
    raw = bytearray(open(path, "rb").read())
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    out = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        out[name] = torch.frombuffer(raw, dtype=torch.float32, count=(end - begin) // 4, offset=8 + n + begin).reshape(t["shape"])
    return out


def save(path, tensors):
    """Write a safetensors file."""
    header, offset, bodies = {}, 0, []
    for name, t in tensors.items():
        body = t.detach().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [offset, offset + len(body)]}
        offset += len(body)
        bodies.append(body)
    h = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(h)) + h)
        for body in bodies:
            f.write(body)


def main():
    torch.manual_seed(1)
    x, y = idx("train-images-idx3-ubyte.gz")[:, None].float() / 255, idx("train-labels-idx1-ubyte.gz").long()
    xt, yt = idx("t10k-images-idx3-ubyte.gz")[:, None].float() / 255, idx("t10k-labels-idx1-ubyte.gz").long()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )
    model.load_state_dict(load(MODEL))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(1, EPOCHS + 1):
        order, total, steps = torch.randperm(len(x)), 0.0, min(STEPS, len(x) // BATCH)
        for i in range(steps):
            batch = order[i * BATCH : (i + 1) * BATCH]
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            if (i + 1) % 100 == 0:
                print(json.dumps({"epoch": epoch, "step": i + 1, "loss": round(total / (i + 1), 4)}), flush=True)
        with torch.no_grad():
            hits = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(xt.split(1000), yt.split(1000)))
        print(json.dumps({"epoch": epoch, "loss": round(total / steps, 4), "accuracy": hits / len(xt)}), flush=True)
        tmp = os.path.join(CHECKPOINTS, "epoch-%d.tmp" % epoch)
        os.mkdir(tmp)
        save(os.path.join(tmp, "model.safetensors"), model.state_dict())
        os.rename(tmp, tmp[: -len(".tmp")])


main()
