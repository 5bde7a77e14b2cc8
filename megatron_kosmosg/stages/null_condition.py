"""The null condition of classifier-free guidance: `<s>` alone through decoder and AlignerNet.

It is an extra row of the batch, so that it needs no second forward pass and gradient reaches it
(reference code; the paper leaves it open).
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_kosmosg.data.tokenizer import Tokenizer


def forward_with_null_row(batch: dict[str, torch.Tensor], model: nn.Module):
    """The model's output for the micro-batch and, as its last row, for `<s>` alone."""
    tokens = batch["tokens"]
    null_tokens = tokens.new_full((1, tokens.shape[1]), Tokenizer.pad_id)
    null_tokens[:, 0] = Tokenizer.bos_id
    packed = batch.get("packed")
    if packed is not None:
        packed = torch.cat([packed, packed.new_full((1,), tokens.numel())])
    no_image = torch.zeros_like(null_tokens, dtype=torch.bool)
    return model(
        torch.cat([tokens, null_tokens]),
        torch.cat([batch["image_mask"], no_image]),
        torch.cat([batch["padding_mask"], null_tokens == Tokenizer.pad_id]),
        batch["pixel_values"],
        packed,
    )
