"""Kind `interleaved`: a document of texts and images in any order.

Stored parts: JSON {key, ...}, then tokens and images in reading order.
"""

from __future__ import annotations

from megatron_kosmosg.data.kinds.kind import Conversion, Converted, PackedDocuments, SampleKind
from megatron_kosmosg.data.kinds.record import (
    Record,
    Rejected,
    extra_fields,
    list_field,
    text_field,
)
from megatron_kosmosg.data.stored_sample import IMAGE, TOKENS, StoredPart


def convert(record: Record, use: Conversion) -> Converted:
    """Converts a record {"key", "content": [...]} whose content are texts {"text"} and images
    {"image"} in any order."""
    info = {"key": record.key} | extra_fields(record.fields, ("key", "content"))
    parts, left_out = [StoredPart.json(info)], []
    num_images = 0
    for item in list_field(record.fields, "content"):
        if not isinstance(item, dict):
            raise Rejected("content item is neither text nor image", repr(item)[:80])
        # Parquet gives every item both fields, one of them null.
        present = [name for name in ("text", "image") if item.get(name) is not None]
        if len(present) != 1:
            raise Rejected("content item is neither text nor image", f"it has {present}")
        if present == ["text"]:
            parts.append(StoredPart.tokens(use.encode(text_field(item, "text"))))
            continue
        if num_images == use.options.max_images:
            left_out.append("images: more than --max-images")
            continue
        try:
            image = use.image(record, item, "image")
        except Rejected as rejected:
            if not use.options.drop_bad_images:
                raise
            left_out.append(f"images: {rejected.reason}")
            continue
        num_images += 1
        parts.append(StoredPart(IMAGE, image))
    if num_images < use.options.min_images:
        raise Rejected("document with too few images", str(num_images))
    if not any(part.mode == TOKENS and part.data for part in parts):
        raise Rejected("document without text")
    return Converted(parts, tuple(left_out))


INTERLEAVED = SampleKind(
    name="interleaved",
    record='{"key", "content": [{"text": ..} or {"image": ..}, ...]}',
    fields=("content", "text_list", "image_info", "texts", "images"),  # MMC4's, OBELICS's
    convert=convert,
    options=("min_images", "max_images", "drop_bad_images"),
    pretrain=PackedDocuments(images_per_row=8.0),
)
