"""A sample as it is stored: parts that are token ids, encoded images or one small JSON object.

Needs neither torch nor Megatron, so that a preprocessing worker starts in a fraction of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_kosmosg.foreign_files import parse_json

if TYPE_CHECKING:  # help texts list the kinds of samples, without numpy
    import numpy as np

    from megatron_kosmosg.data.tokenizer import Tokenizer

TOKENS, IMAGE, JSON = 0, 1, 2
"""Modes of a part."""
TOKEN_TYPE, TOKEN_BYTES = "<i4", 4
"""Of a token id, by numpy's name, and its size."""

PartSizes = list[tuple[int, int]]
"""(mode, size) of the parts of a sample but the JSON one; see SampleStore.part_sizes."""


@dataclass(frozen=True)
class StoredPart:
    """One part of a sample, ready to be written."""

    mode: int
    data: bytes

    @staticmethod
    def tokens(ids: np.ndarray) -> StoredPart:
        """Makes a part of token ids."""
        return StoredPart(TOKENS, ids.astype(TOKEN_TYPE).tobytes())

    @staticmethod
    def json(value: dict[str, Any]) -> StoredPart:
        """Makes a part of a small JSON object."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return StoredPart(JSON, text.encode("utf-8"))


@dataclass(frozen=True)
class RawSample:
    """A stored sample: its JSON part and views of the other parts, in order."""

    info: dict[str, Any]
    parts: list[np.ndarray]
    """int32 token ids or uint8 image bytes, as `modes` says; mapped, not copied."""
    modes: list[int]

    @staticmethod
    def of_bytes(stored: Iterable[tuple[np.ndarray, int]]) -> RawSample:
        """The sample whose parts are `stored`: uint8 bytes and mode of each, in order.

        Raises ValueError for parts that are damaged.
        """
        info: dict[str, Any] = {}
        parts, modes = [], []
        for data, mode in stored:
            if mode == JSON:
                info = parse_json(data.tobytes())
                if not isinstance(info, dict):
                    raise ValueError("its JSON part is no object")
            else:
                parts.append(data.view(TOKEN_TYPE) if mode == TOKENS else data)
                modes.append(int(mode))
        return RawSample(info, parts, modes)

    def tokens(self) -> list[np.ndarray]:
        """The parts that are token ids, in order, int32."""
        return [p for p, mode in zip(self.parts, self.modes, strict=True) if mode == TOKENS]

    def images(self) -> list[bytes]:
        """The parts that are images, in order, copied."""
        return [
            p.tobytes() for p, mode in zip(self.parts, self.modes, strict=True) if mode == IMAGE
        ]


def strip_document_end(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The ids without the </s> that may close them."""
    return ids[:-1] if ids.size and ids[-1] == tokenizer.eos_id else ids
