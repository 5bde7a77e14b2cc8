"""An exported folder (of export-hf, export-mllm or export-lora): what lies in it, how one is begun,
and how its JSON files are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_kosmosg import files
from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.overwrites import refuse_to_overwrite
from megatron_kosmosg.foreign_files import read_json

INDEX_FILE = "model_index.json"
"""Only export-hf writes one."""
MLLM, ALIGNER, TOKENIZER, IMAGE_PROCESSOR = "mllm", "aligner", "tokenizer", "mllm_image_processor"
"""Folders of the parts, which are the pipeline's names for them."""


class ExportedParts(NamedTuple):
    """Folders of the language side; they need not exist."""

    mllm: Path
    tokenizer: Path
    image_processor: Path
    aligner: Path | None
    """None: the folder is one of export-mllm."""


def exported_parts(folder: Path) -> ExportedParts:
    """The parts of `folder`; export-mllm puts all of them into the folder itself."""
    if not (folder / INDEX_FILE).is_file():
        return ExportedParts(folder, folder, folder, None)
    return ExportedParts(*(folder / part for part in (MLLM, TOKENIZER, IMAGE_PROCESSOR, ALIGNER)))


@contextmanager
def new_output_folder(output: Path, reads: Sequence[Path]) -> Iterator[Path]:
    """Makes `output` as files.new_folder does; left-overs of a killed process are replaced.

    Raises ConversionError when `output` exists, ConfigError when the temporary folder is one of
    `reads`, what the folder is made from.
    """
    if output.exists():
        raise ConversionError(f"{output} exists; give a new folder or remove it")
    refuse_to_overwrite([files.temporary_name(output, only_writer=True)], reads, "--output")
    with files.new_folder(output, only_writer=True) as folder:
        yield folder


def read_model_json(path: Path) -> dict[str, Any]:
    """The object in the file. Raises ConversionError for one that is not there or holds none."""
    if not path.is_file():
        raise ConversionError(f"no {path}; is this the folder of an exported model?")
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
