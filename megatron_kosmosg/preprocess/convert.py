"""What the records of a shard are converted with: the tokenizer, the check of images, options."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_kosmosg.data.kinds.kind import Converted, SampleKind
from megatron_kosmosg.data.kinds.record import Record, Rejected, text_field
from megatron_kosmosg.data.sentences import sentence_table
from megatron_kosmosg.data.stored_sample import RawSample
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess.image_check import ImageCheck
from megatron_kosmosg.preprocess.options import Options

NOT_PACKED = np.zeros((0, 2), np.int32)


class RecordConversion:
    """What records are converted with, as the kinds ask for it (data.kinds.kind.Conversion)."""

    def __init__(self, tokenizer: Tokenizer, options: Options | None = None) -> None:
        self.options = options or Options()
        self.image_check = ImageCheck(self.options)
        self._tokenizer = tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a run of text."""
        return self._tokenizer.encode_array(text)

    def text_field(self, fields: dict[str, Any], name: str) -> tuple[str, np.ndarray]:
        """A field's text and its ids, of which there is one at least. Raises Rejected."""
        text = text_field(fields, name)
        ids = self.encode(text)
        if not len(ids):
            # Zero-width characters, say: no blanks, but the tokenizer drops them.
            raise Rejected(f"{name} without tokens", repr(text)[:80])
        return text, ids

    def image(self, record: Record, fields: dict[str, Any], name: str) -> bytes:
        """The stored form of a field's image (ImageCheck.read)."""
        return self.image_check.read(record, fields, name)

    def mask(self, record: Record, fields: dict[str, Any], name: str, image: bytes) -> bytes | None:
        """The stored form of a field's mask (ImageCheck.read_mask)."""
        return self.image_check.read_mask(record, fields, name, image)

    def sentences(self, kind: SampleKind, converted: Converted) -> np.ndarray:
        """The sentence table of a sample; empty for kinds that are not packed."""
        if kind.pretrain is None:
            return NOT_PACKED
        raw = RawSample.of_bytes(
            (np.frombuffer(part.data, np.uint8), part.mode) for part in converted.parts
        )
        return sentence_table(kind.pretrain.content(raw, self._tokenizer), self._tokenizer)
