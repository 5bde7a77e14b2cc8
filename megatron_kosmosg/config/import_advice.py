"""Folders of other formats that are given where a checkpoint is asked for: what makes one of them.

Only the names of files and the kind of model are looked at; the importing commands judge the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_kosmosg.foreign_files import read_json

_PIPELINE, _MODEL = "model_index.json", "config.json"


def how_to_import(path: Path) -> str | None:
    """What `path` is and which command makes a checkpoint of it, as the second half of a message;
    None for what no command reads."""
    if path.suffix == ".pt" and path.is_file():
        return _advice("a file of the authors", "import-fairseq", path)
    if (path / _PIPELINE).is_file():
        if (path / "mllm").is_dir():
            return _advice("a folder of export-hf", "import-hf", path)
        return "it is a diffusers pipeline without a language model; model.diffusion.path takes it"
    if _model_type(path / _MODEL) == "kosmos-2":
        return _advice("a Kosmos-2 in Hugging Face's layout", "import-kosmos2", path)
    return None


def _advice(what: str, command: str, path: Path) -> str:
    return (
        f"it is {what}: make a checkpoint of it with `kosmosg convert {command} --input {path} "
        "--output RUN` and give RUN"
    )


def _model_type(config: Path) -> Any:
    try:
        found = read_json(config)
    except (OSError, ValueError):
        return None
    return found.get("model_type") if isinstance(found, dict) else None
