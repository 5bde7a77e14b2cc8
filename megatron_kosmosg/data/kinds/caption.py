"""Kind `caption`: a picture and what it shows.

Stored parts: JSON {key, caption, ...}, tokens of the caption, picture.
"""

from __future__ import annotations

from megatron_kosmosg.data.keyed import Draws
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import PartSizes, RawSample

TOKENS_PART = 1
"""Place of the caption's tokens among the stored parts."""
MAX_TOKENS = 128
"""Longest caption that `instruct` uses, in tokens without <s> (the authors' loader)."""


def document(raw: RawSample, sequence_format: SequenceFormat) -> SequenceBuilder:
    """<s> picture caption </s>, for `pretrain`."""
    builder = SequenceBuilder(sequence_format).add_start()
    return builder.add_image(raw.images()[0]).add_text(raw.tokens()[0]).add_end()


def target_picture(raw: RawSample) -> memoryview:
    """The encoded picture that `instruct` learns to draw."""
    return memoryview(raw.parts[1])


class CaptionPrompts:
    """Text-to-image prompts: <s> caption, the picture as the target."""

    def __init__(self, sequence_format: SequenceFormat) -> None:
        self._format = sequence_format

    def length(self, sizes: PartSizes, draws: Draws) -> int | None:
        """Tokens of the prompt; None when the caption is longer than MAX_TOKENS."""
        num_tokens = sizes[0][1]
        return None if num_tokens > MAX_TOKENS else 1 + num_tokens

    def __call__(self, raw: RawSample, draws: Draws) -> Prompt:
        """The prompt; draws nothing."""
        (ids,) = raw.tokens()
        builder = SequenceBuilder(self._format).add_start().add_text(ids)
        return builder.prompt(target_picture(raw), raw.info["caption"])
