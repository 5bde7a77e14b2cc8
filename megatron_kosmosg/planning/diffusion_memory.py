"""Bytes that the frozen U-Net keeps for its condition's gradient, counted on the real class.

Its forward pass runs on the meta device under hooks that see every tensor saved; attention is
replaced by one that keeps what fused kernels keep, instead of its matrix.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.overrides import TorchFunctionMode

from megatron_kosmosg.models.diffusion_flops import unet_and_vae

PEAK_OVER_SAVED = 1.22
"""Peak of the U-Net's forward and backward over what it saves: 1,713 of 1,405 MiB, measured for
Stable Diffusion v1.5 in float32 with fused attention."""
KEPT_WITH_RECOMPUTE = 0.5
"""Peak share under gradient checkpointing: a fifth stays (285 of 1,405 MiB measured), and the
largest block comes back; estimated."""


@cache
def unet_bytes(path: str | None, image_size: int, condition_length: int) -> tuple[int, int]:
    """(bytes saved per image, largest feature map of the VAE's encoder per image), in float32."""
    unet, vae = unet_and_vae(path)
    side = image_size // 2 ** (len(vae.config.block_out_channels) - 1)
    condition = torch.empty(
        1, condition_length, unet.config.cross_attention_dim, device="meta", requires_grad=True
    )
    latents = torch.empty(1, unet.config.in_channels, side, side, device="meta")
    kept: dict[int, torch.Tensor] = {}
    held = {p.untyped_storage()._cdata for p in unet.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        unet(latents, torch.zeros(1, dtype=torch.int64, device="meta"), condition)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    feature_map = image_size**2 * vae.config.block_out_channels[0] * latents.element_size()
    return saved, feature_map


class _FusedAttention(TorchFunctionMode):
    """Attention that saves its inputs and its output, as flash kernels do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = kwargs or {}
            query, key, value = (
                args[i] if i < len(args) else given[name]
                for i, name in enumerate(("query", "key", "value"))
            )
            return _SavesInputsAndOutput.apply(query, key, value)
        return func(*args, **(kwargs or {}))


class _SavesInputsAndOutput(torch.autograd.Function):
    """Only its bookkeeping is used: on the meta device there are no numbers."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output
