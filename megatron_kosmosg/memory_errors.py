"""Whether an error says that memory does not suffice: it has another type for each allocator."""

from __future__ import annotations

_SAID = (
    "can't allocate memory",  # torch on a CPU
    "out of memory",  # CUDA, also through libraries that raise a RuntimeError
    "Storage size calculation overflowed",  # torch, asked for more than can be addressed
    "integer multiplication overflow",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is of an allocation that failed, on the CPU or on a GPU. It is told by its
    words: torch, which has types for it, need not be imported for commands that do without."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)
