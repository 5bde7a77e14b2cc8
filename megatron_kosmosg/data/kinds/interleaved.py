"""Kind `interleaved`: a document of texts and pictures in any order.

Stored parts: JSON {key, ...}, then tokens and pictures in reading order.
"""

from __future__ import annotations

from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import TOKENS, RawSample


def document(raw: RawSample, sequence_format: SequenceFormat) -> SequenceBuilder:
    """<s> texts and pictures in order </s>."""
    builder = SequenceBuilder(sequence_format).add_start()
    for part, mode in zip(raw.parts, raw.modes, strict=True):
        if mode == TOKENS:
            builder.add_text(part)
        else:
            builder.add_image(part.tobytes())
    return builder.add_end()
