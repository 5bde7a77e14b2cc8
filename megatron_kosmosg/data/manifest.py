"""PREFIX.json: what a dataset is, written last so that its presence means the dataset is whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["text", "caption", "interleaved", "edit", "compositional"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What PREFIX.json holds."""

    kind: Kind
    tokenizer_fingerprint: str
    vocab_size: int
    num_samples: int
    num_tokens: int
    """Text tokens, without document ends and picture positions."""
    num_images: int
    num_rejects: int
    format_version: int = FORMAT_VERSION

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Manifest:
        """The manifest at `path`. Raises ValueError for another format version or broken file."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, this code reads {FORMAT_VERSION}")
            return Manifest(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a readable manifest: {error}") from error


def manifest_path(prefix: str | Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")
