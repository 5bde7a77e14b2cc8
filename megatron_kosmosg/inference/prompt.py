"""An interleaved list of words and pictures -> the model's prompt (authors' demo).

`["a", picture, "in the snow"]` becomes <s> a <image> slots </image> in the snow; every fragment is
tokenized on its own, and no </s> follows.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.transparency import over_white


def build_prompt(parts: Sequence[str | Image.Image], sequence_format: SequenceFormat) -> Prompt:
    """The prompt of `parts`, in their order."""
    builder = SequenceBuilder(sequence_format).add_start()
    for part in parts:
        if isinstance(part, str):
            builder.add_text(sequence_format.tokenizer.encode(part))
        else:
            builder.add_image(_encode(part))
    return builder.prompt()


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    over_white(picture).save(buffer, "PNG")
    return buffer.getvalue()
