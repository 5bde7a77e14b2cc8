"""An interleaved list of words and images -> the model's prompt (authors' demo).

`["a", image, "in the snow"]` becomes <s> a <image> slots </image> in the snow; every fragment is
tokenized on its own, and no </s> follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from megatron_kosmosg.data.image_reading import encode_png, upright_rgb
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat


def build_prompt(parts: Sequence[str | Image.Image], sequence_format: SequenceFormat) -> Prompt:
    """The prompt of `parts`, in their order."""
    builder = SequenceBuilder(sequence_format).add_start()
    for part in parts:
        if isinstance(part, str):
            builder.add_text(sequence_format.tokenizer.encode(part))
        else:
            builder.add_image(encode_png(upright_rgb(part)))
    return builder.prompt()
