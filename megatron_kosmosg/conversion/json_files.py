"""JSON files of models, read with an error for users and written the same way everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_kosmosg import foreign_files
from megatron_kosmosg.config.errors import ConversionError


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file. Raises ConversionError for one that is not there or holds none."""
    if not path.is_file():
        raise ConversionError(f"no {path}; is this the folder of an exported model?")
    try:
        content = foreign_files.read_json(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, in UTF-8, with a newline at the end."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
