"""Opens sealed inputs as memory, without a copy (docs/formats/regions.md).

needs Python 3.9; numpy and torch only where they are asked for. A job copies
this file into its image; it shares no code with coffer.

    import regions
    view = regions.open("weights", "model.bin")               # memoryview
    array = regions.array("weights", "model.bin", "<f4")      # numpy, read-only
    tensor = regions.tensor("weights", "model.bin", "<f4")    # torch, read-only
"""
import json, mmap, os, socket

SOCKET = os.environ.get("COFFER_REGIONS", "/run/coffer/regions.sock")
VERSION = "coffer.run/regions/v1"

def descriptor(given, name):
    """Returns (fd, size): a descriptor for reading, which the caller closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(SOCKET)
        s.sendall(json.dumps({"version": VERSION, "open": f"{given}/{name}"}).encode())
        reply, fds, _, _ = socket.recv_fds(s, 4096, 1)
    answer = json.loads(reply or b'{"error": "no answer"}')
    if "error" in answer or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise OSError(f"{given}/{name}: {answer.get('error', 'no descriptor')}")
    return fds[0], answer.get("size", 0)

def open(given, name):
    """Returns the file's memory. It is the holder's own pages, mapped."""
    fd, size = descriptor(given, name)
    try:
        if size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
    finally:
        os.close(fd)

def array(given, name, dtype="u1", shape=-1, offset=0):
    """Returns a read-only numpy array over the file's memory, from offset on."""
    import numpy
    return numpy.frombuffer(open(given, name)[offset:], dtype).reshape(shape)

def tensor(given, name, dtype="u1", shape=-1, offset=0):
    """Returns a torch tensor over the file's memory. Torch does not know memory
    that cannot be written to: an operation in place ends the program."""
    import torch, warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array(given, name, dtype, shape, offset))
