"""The folder that a conversion writes: a new one, which is none of those that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_kosmosg import files
from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.overwrites import refuse_to_overwrite


@contextmanager
def new_folder(output: Path, reads: Sequence[Path]) -> Iterator[Path]:
    """Makes `output` as files.new_folder does; left-overs of a killed process are replaced.

    Raises ConversionError when `output` exists, ConfigError when the temporary folder is one of
    `reads`, what the folder is made from.
    """
    if output.exists():
        raise ConversionError(f"{output} exists; give a new folder or remove it")
    refuse_to_overwrite([files.temporary_name(output, only_writer=True)], reads, "--output")
    with files.new_folder(output, only_writer=True) as folder:
        yield folder
