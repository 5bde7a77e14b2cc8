"""Reading a folder of frozen networks: what is wrong with its files is an error of the input.

diffusers, transformers, safetensors and torch each raise something else for a weight file that is
missing, cut off or of another shape. The same start would fail again, so it ends with exit code 2.
"""

from __future__ import annotations

import errno
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from megatron_kosmosg.config.errors import ConfigError, InputError

_MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE)
"""What a file server or a full machine answers once and perhaps not again."""
_OF_THE_FILES = (
    ValueError,
    RuntimeError,
    KeyError,
    EOFError,
    SafetensorError,
    pickle.PickleError,
)
"""What the libraries raise for content that is damaged or of another shape."""


@contextmanager
def reading_frozen(setting: str) -> Iterator[None]:
    """Context in which files of `setting` (as "model.diffusion.path=/models/sd") are read into
    networks.

    Raises ConfigError for files that cannot be; lets pass what may be over at the next start.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        if error.errno in _MAY_PASS:
            raise
        raise ConfigError(_message(setting, error)) from error
    except _OF_THE_FILES as error:
        raise ConfigError(_message(setting, error)) from error


def _message(setting: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{setting} cannot be read: {' '.join(lines[:2]) or type(error).__name__}"
