"""What an image module gives for a micro-batch of text alone, without running on empty tensors.

Gradient buckets wait for all their parameters, also then; and TransformerEngine's linears refuse
tensors without rows, as torch's flash attention did before 2.10.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def no_images(features: torch.Tensor, inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """`features`, which have no rows, tied to `inputs` such that in backward every one of these
    that wants a gradient gets one of zero."""
    return _NoImages.apply(features, *(x for x in inputs if x.requires_grad))


class _NoImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return features.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return None, *(torch.zeros_like(x) for x in ctx.saved_tensors)
