"""A file mapped into memory, without a descriptor that stays open.

numpy's and Python's mappings keep a descriptor each; a dataset of thousands of shards has more
files than a process may have open. A mapping lives as long as an array of it.
"""

from __future__ import annotations

import ctypes
import errno
import io
import math
import mmap
import os
import stat
import weakref
from pathlib import Path

import numpy as np

_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_C.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value
_HEADER_BYTES = 4096
"""Of a .npy file, at most; those of plain tables have 128."""


def map_file(path: str | Path) -> np.ndarray:
    """The file's bytes as a read-only array, uint8 [size of the file]. Raises OSError, also for
    what is no regular file."""
    # Opening a pipe would wait for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "Is no regular file", str(path))
        if found.st_size == 0:
            return np.zeros(0, np.uint8)
        address = _C.mmap(None, found.st_size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot be mapped ({os.strerror(code)})", str(path))
    finally:
        os.close(descriptor)
    memory = (ctypes.c_ubyte * found.st_size).from_address(address)
    # Not at the end of the process: threads may still read then.
    weakref.finalize(memory, _C.munmap, address, found.st_size).atexit = False
    array = np.frombuffer(memoryview(memory), np.uint8)
    array.flags.writeable = False
    return array


def map_array(path: str | Path) -> np.ndarray:
    """The numbers of a .npy file, read-only. Raises OSError and ValueError."""
    data = map_file(path)
    header = io.BytesIO(data[:_HEADER_BYTES].tobytes())
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError(f"{path} is no .npy file of version 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header)
    if dtype.hasobject or is_fortran:
        raise ValueError(f"{path} holds objects, or a table by columns; neither is read")
    size = math.prod(shape) * dtype.itemsize
    stored = data[header.tell() : header.tell() + size]
    if min(shape, default=0) < 0 or len(stored) != size:
        raise ValueError(f"{path} is cut: {len(stored)} of {size} bytes")
    return stored.view(dtype).reshape(shape)
