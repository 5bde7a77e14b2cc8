"""Which kernel `scaled_dot_product_attention` takes on the GPU, and what that kernel allocates.

As torch 2.13 chooses: flash for half precision without a mask from compute capability 8.0 on, then
memory-efficient, then the one that writes the matrix of weights out. On Hopper and Blackwell it
asks cuDNN's first, which gives flash's tensors: it is called flash here, where no cuDNN is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from megatron_kosmosg.rehearsal.recorder import Recorder

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_WIDEST_FLASH_HEAD = 256
_AMPERE = (8, 0)
"""The first compute capability with flash attention, and with attention in bfloat16."""


def answer_for_attention(recorder: Recorder) -> None:
    """Puts the choice into torch, for the rest of this process."""
    real = F.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        args = (query, key, value, attn_mask, dropout_p, is_causal)
        kwargs = {"scale": scale, "enable_gqa": enable_gqa}
        if has_torch_function_variadic(query, key, value):
            function = F.scaled_dot_product_attention
            return handle_torch_function(function, (query, key, value), *args, **kwargs)
        _check(query, key, value, attn_mask)
        if query.device.type != "cuda":
            return real(*args, **kwargs)
        if 0 in query.shape or 0 in key.shape:
            kernel = _matrix
        else:
            kernel = _choose(query, attn_mask)
        masked = "no mask" if attn_mask is None else f"mask {tuple(attn_mask.shape)}"
        kind = "causal" if is_causal else masked
        site = f"{tuple(query.shape)} x {key.shape[2]}, {str(query.dtype)[6:]}, {kind}"
        name = "empty" if 0 in query.shape or 0 in key.shape else kernel.__name__.strip("_")
        recorder.now.attention.setdefault(name, Counter())[site] += 1
        return kernel(query, key, value, attn_mask, dropout_p, is_causal, scale)

    F.scaled_dot_product_attention = scaled_dot_product_attention
    operators: Any = torch._C
    operators._nn.scaled_dot_product_attention = scaled_dot_product_attention


def _check(query, key, value, mask) -> None:
    for other in (key, value, *([] if mask is None else [mask])):
        if other.device != query.device:
            raise RuntimeError(f"attention of a query on {query.device} with {other.device}")
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"attention of {query.dtype} with a mask of {mask.dtype}")


def _choose(query: torch.Tensor, mask: torch.Tensor | None):
    half, width = query.dtype in _HALF, query.shape[-1]
    is_recent = torch.cuda.get_device_capability() >= _AMPERE
    if half and mask is None and width <= _WIDEST_FLASH_HEAD and is_recent:
        return _flash
    if width % (8 if half else 4) == 0 and (is_recent or query.dtype is not torch.bfloat16):
        return _efficient
    return _matrix


def _flash(query, key, value, mask, dropout_p, is_causal, scale):
    width = query.shape[-1]
    padding = -width % 8
    if padding:
        query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    out = aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale or width**-0.5
    )[0]
    return out[..., :width]


def _efficient(query, key, value, mask, dropout_p, is_causal, scale):
    if mask is not None:
        if mask.dtype is torch.bool:
            bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
            mask = bias.masked_fill_(~mask, float("-inf"))
        mask = mask.expand(*query.shape[:3], key.shape[2])
    keeps_weights = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, keeps_weights, dropout_p, is_causal, scale=scale
    )[0]


def _matrix(query, key, value, mask, dropout_p, is_causal, scale):
    return aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout_p, is_causal, scale=scale
    )[0]
