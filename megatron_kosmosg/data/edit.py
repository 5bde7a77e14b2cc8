"""Kind `edit`: a picture, an instruction, and the picture after it (InstructPix2Pix).

Stored parts: JSON {key, caption, instruction, ...}, tokens of the caption, tokens of the
instruction, picture before, picture after.
"""

from __future__ import annotations

from megatron_kosmosg.data.keyed import Draws
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import RawSample


class EditPrompts:
    """<s> [caption] picture instruction; the edited picture is the target."""

    def __init__(self, sequence_format: SequenceFormat, caption_drop_prob: float) -> None:
        self._format = sequence_format
        self._caption_drop_prob = caption_drop_prob

    def __call__(self, raw: RawSample, draws: Draws) -> Prompt:
        """The prompt; one coin decides whether the caption of the first picture is said."""
        caption, instruction = raw.tokens()
        before, after = raw.images()
        builder = SequenceBuilder(self._format).add_start()
        if not draws.coin("caption drop", self._caption_drop_prob):
            builder.add_text(caption)
        builder.add_image(before).add_text(instruction)
        return builder.prompt(after, raw.info["instruction"])
