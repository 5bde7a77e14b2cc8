"""The files and folders in the output of export-hf and export-mllm."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

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
