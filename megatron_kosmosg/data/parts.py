"""The parts of a stored sample: token ids, encoded pictures and a small JSON object.

Needs neither torch nor Megatron, so that a preprocessing worker starts in a fraction of a second.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

TOKENS, IMAGE, JSON = 0, 1, 2
"""Modes of a part."""
TOKEN_TYPE = np.dtype("<i4")


@dataclass(frozen=True)
class Part:
    """One part of a sample, as stored."""

    mode: int
    data: bytes

    @staticmethod
    def tokens(ids: np.ndarray) -> Part:
        """Token ids as a part."""
        return Part(TOKENS, np.asarray(ids, TOKEN_TYPE).tobytes())

    @staticmethod
    def json(value: dict[str, Any]) -> Part:
        """A small JSON object as a part."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return Part(JSON, text.encode("utf-8"))
