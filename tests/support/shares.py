"""Tensors of the whole model from the shares that ranks hold of them, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module

from megatron_kosmosg.models.initialise import global_name, split_axis
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel.context import ParallelContext


@dataclass(frozen=True)
class Share:
    """What one rank holds: parameters or their gradients by the whole model's names."""

    tp_rank: int
    tensors: dict[str, np.ndarray]
    """NumPy travels between processes whole; torch would share memory."""


def parameters(model: KosmosG, context: ParallelContext) -> Share:
    """This rank's parameters."""
    return _share(model, context, lambda parameter: parameter)


def gradients(model: KosmosG, context: ParallelContext) -> Share:
    """This rank's reduced gradients of what trains, as Megatron's DDP leaves them."""
    return _share(model, context, lambda p: p.main_grad if p.requires_grad else None)


def _share(
    model: KosmosG,
    context: ParallelContext,
    value: Callable[[torch.nn.Parameter], torch.Tensor | None],
) -> Share:
    first = model._spec.first_decoder_layer
    found = {global_name(name, first): value(p) for name, p in model.named_parameters()}
    return Share(
        context.tp_rank,
        {name: _numpy(value) for name, value in found.items() if value is not None},
    )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()  # NumPy knows no bfloat16
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def whole(shares: Iterable[Share], tolerance: float) -> dict[str, np.ndarray]:
    """Every tensor put together from all ranks' shares.

    Replicas (over tensor-parallel ranks, data-parallel ranks, and the tied head's copy) must agree
    to `tolerance` of the tensor's largest entry.
    """
    known: dict[str, dict[int, np.ndarray]] = {}
    for share in shares:
        for name, tensor in share.tensors.items():
            if name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            first = known.setdefault(name, {}).setdefault(share.tp_rank, tensor)
            _agree(name, first, tensor, tolerance)
    together = {}
    for name, by_rank in known.items():
        ordered = [by_rank[rank] for rank in sorted(by_rank)]
        axis = split_axis(name)
        if axis is None:
            for other in ordered[1:]:
                _agree(name, ordered[0], other, tolerance)
        together[name] = ordered[0] if axis is None else np.concatenate(ordered, axis=axis)
    return together


def _agree(name: str, one: np.ndarray, other: np.ndarray, tolerance: float) -> None:
    bound = tolerance * np.abs(one).max()
    np.testing.assert_allclose(one, other, rtol=0, atol=bound, err_msg=name)


@torch.no_grad()
def fill(model: KosmosG, context: ParallelContext, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give this rank its share of the whole model's parameters, each of which must be there."""
    first = model._spec.first_decoder_layer
    for local_name, parameter in model.named_parameters():
        name = global_name(local_name, first)
        if name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        axis, tensor = split_axis(name), tensors[name]
        if axis is not None:
            tensor = tensor.chunk(context.tp_size, dim=axis)[context.tp_rank]
        assert tensor.shape == parameter.shape, name
        parameter.copy_(tensor)


def unwrap_model(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The stage's own modules inside Megatron-Core's wrappers."""
    bare = []
    for chunk in chunks:
        while isinstance(chunk, (DistributedDataParallel, Float16Module)):
            chunk = chunk.module
        bare.append(chunk)
    return bare
