"""A folder that exists under its final name only when everything in it is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.overwrites import refuse_to_overwrite


@contextmanager
def new_folder(output: Path, reads: Sequence[Path]) -> Iterator[Path]:
    """A temporary folder beside `output` to fill; renamed at the end, removed when that fails.

    Raises ConversionError when `output` exists, ConfigError when the temporary folder is one of
    `reads`, what the folder is made from. Left-overs of a killed process are replaced.
    """
    if output.exists():
        raise ConversionError(f"{output} exists; give a new folder or remove it")
    temporary = output.with_name(f"{output.name}.tmp")
    refuse_to_overwrite([temporary], reads, "--output")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(output)
    except BaseException:  # an interrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        raise
