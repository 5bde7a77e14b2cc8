"""Kind `text`: one document of plain text.

Stored as an ordinary Megatron token dataset: one document is one sequence of ids that ends in </s>.
Documents are tokenised many at a time (preprocess/text_batches.py).
"""

from __future__ import annotations

from megatron_kosmosg.data.kinds.kind import PackedDocuments, SampleKind
from megatron_kosmosg.data.kinds.record import text_field
from megatron_kosmosg.data.stored_sample import TOKENS

TEXT = SampleKind(
    name="text",
    record='{"text"}',
    fields=("text",),
    plain_text=lambda record: text_field(record.fields, "text"),
    formats=("jsonl", "txt", "parquet", "arrow"),
    part_modes=(TOKENS,),
    pretrain=PackedDocuments(images_per_row=0.0),
)
