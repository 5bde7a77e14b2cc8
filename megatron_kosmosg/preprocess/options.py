"""The choices that, besides the input, decide what a preprocessing run writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.kinds.kind import SampleKind

FORMATS = ("auto", "jsonl", "tar", "parquet", "arrow", "tsv", "txt")
"""What may be asked for; a folder tells its format itself."""
Verification = Literal["decode", "header"]
DocumentBreak = Literal["blank", "line", "file"]
VERIFICATIONS: tuple[Verification, ...] = get_args(Verification)
DOCUMENT_BREAKS: tuple[DocumentBreak, ...] = get_args(DocumentBreak)
MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's own limit: 256 MiB of RGB pixels."""


@dataclass(frozen=True)
class Options:
    """The options of `kosmosg preprocess` that decide what is written; that command's help explains
    them."""

    verify_images: Verification = "decode"
    """"header" does not notice a truncated file."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Width times height beyond which an image is rejected before it is decoded."""
    min_image_side: int = 1
    """Pixels of the shorter side below which an image is rejected; not asked of masks."""
    image_root: str | None = None
    """Folder that file names of images refer to; None: that of the file which names them."""
    fields: tuple[tuple[str, str], ...] = ()
    """(our name of a field, its name in the input)."""
    text_documents: DocumentBreak = "blank"
    """Where a document of a plain text file ends."""
    min_images: int = 0
    """Images that an interleaved document needs."""
    max_images: int | None = None
    """Images of an interleaved document that are kept, from its start; None keeps all."""
    drop_bad_images: bool = False
    """Leave unusable images out of interleaved documents instead of rejecting the documents."""

    def check(self, kind: SampleKind) -> None:
        """Raises ValueError for choices that are impossible or that `kind` does not know."""
        default = vars(Options())
        of_kinds = {option for other in KINDS.values() for option in other.options}
        for option in sorted(of_kinds - set(kind.options)):
            if vars(self)[option] != default[option]:
                able = ", ".join(k.name for k in KINDS.values() if option in k.options)
                raise ValueError(
                    f"--{option.replace('_', '-')} is for --kind {able}, not {kind.name}"
                )
        known = ("key", *kind.fields)
        for field_name, input_name in self.fields:
            if field_name not in known:
                raise ValueError(
                    f"--field {field_name}={input_name}: --kind {kind.name} has no field "
                    f"{field_name}; it has {', '.join(known)}"
                )
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise ValueError(f"--image-root {self.image_root} is not a folder")
        if self.min_image_side < 1 or self.min_images < 0:
            raise ValueError(
                f"--min-image-side {self.min_image_side} must be at least 1, --min-images "
                f"{self.min_images} at least 0"
            )
        if not 1 <= self.max_image_pixels <= 2 * MAX_IMAGE_PIXELS:
            raise ValueError(
                f"--max-image-pixels {self.max_image_pixels} must lie in 1 to "
                f"{2 * MAX_IMAGE_PIXELS}, beyond which Pillow does not decode"
            )
        if self.max_images is not None and self.max_images < max(1, self.min_images):
            raise ValueError(
                f"--max-images {self.max_images} must be at least 1 and --min-images "
                f"({self.min_images})"
            )
