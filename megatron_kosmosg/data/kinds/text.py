"""Kind `text`: one document of plain text.

Stored as an ordinary Megatron token dataset: one document is one sequence of ids that ends in </s>.
"""

from __future__ import annotations

import numpy as np

from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.store import RawSample, strip_document_end


def document(raw: RawSample, sequence_format: SequenceFormat) -> SequenceBuilder:
    """<s> text </s>."""
    (ids,) = raw.parts
    ids = strip_document_end(np.asarray(ids), sequence_format.tokenizer)
    return SequenceBuilder(sequence_format).add_start().add_text(ids).add_end()
