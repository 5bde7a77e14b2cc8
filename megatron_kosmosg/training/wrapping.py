"""The Megatron-Core wrappers around a stage's model: half precision, then data parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.platform import torch_dtype


@contextmanager
def parameters_in(precision: str) -> Iterator[None]:
    """Context in which modules hold their parameters in the training precision as soon as they are
    given them.

    A model that is built whole in float32 and cast by `wrap_model` would take 4 bytes a weight
    first, which is more than an update of frozen weights does. What fills the parameters computes
    in float32 and rounds as that cast would.
    """
    dtype = torch_dtype(precision)

    def cast(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)  # the same object, with its marks

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(cast)
    try:
        yield
    finally:
        hook.remove()


def wrap_model(
    chunks: Sequence[MegatronModule], config: RunConfig
) -> list[DistributedDataParallel]:
    """The chunks in the training precision, gradients accumulated in fp32 and reduced over
    replicas. Chunks come as the stage built them, in fp32 or under `parameters_in`, each with its
    `config`."""
    parallel = config.parallel
    wrapped = []
    for index, chunk in enumerate(chunks):
        inner = chunk if config.training.precision == "fp32" else Float16Module(chunk.config, chunk)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        )
        parallel_chunk = DistributedDataParallel(
            chunk.config, settings, inner, disable_bucketing=index > 0
        )
        _count_padding(parallel_chunk)
        wrapped.append(parallel_chunk)
    return wrapped


def _count_padding(chunk: DistributedDataParallel) -> None:
    """Makes saved optimizer states right where gradients lie in several buckets.

    Megatron-Core leaves the padding behind each bucket out of what it saves, yet finds a
    parameter in it by a place that counts the padding: main parameters and moments of all but the
    first bucket would be saved shifted. Padding that counts as content leaves nothing out.
    """
    # Megatron-Core's list is named as torch's method.
    for buffer in cast(list[Any], chunk.buffers):
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel


@contextmanager
def whole_parameters(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Context in which every rank's parameters are those of the last update.

    With overlapped gathering a rank has only its own share until the next forward pass asks.
    """
    overlaps = chunks[0].ddp_config.overlap_param_gather
    if overlaps:
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
    yield
    if overlaps:
        for chunk in chunks:
            chunk.enable_forward_pre_hook()
