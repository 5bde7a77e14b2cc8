"""Kind `text`: one document of plain text, for `pretrain` alone.

It has no sample of JSON and parts as the other kinds have. A dataset of it is an ordinary Megatron
token dataset, which other tools write, too: one document is one sequence of ids that ends in </s>.
So this file says only which field of a record is the document; preprocess/text_batches.py makes the
ids, many documents at a time.
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
    part_modes=(TOKENS,),  # a document is read as if it were one part: its ids
    pretrain=PackedDocuments(images_per_row=0.0),
)
