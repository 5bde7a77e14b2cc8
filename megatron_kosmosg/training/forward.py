"""Forward passes without loss or gradient, through the same pipeline schedule as training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import nn


@torch.no_grad()
def collect_outputs(
    forward: Callable[[dict[str, torch.Tensor], nn.Module], Any],
    model: list[nn.Module],
    micro_batches: Iterator[dict[str, torch.Tensor]],
    num_microbatches: int,
) -> list[Any]:
    """What `forward(batch, model)` gives for each micro-batch; an empty list before the last
    pipeline stage.

    model: the chunks of this rank. All ranks of a replica call this together. The model's
    train/eval mode is the caller's choice.
    """
    batches = list(itertools.islice(micro_batches, num_microbatches))
    if len(model) > 1:  # interleaved pipeline stages take micro-batches in whole groups
        group = get_model_config(model[0]).microbatch_group_size_per_vp_stage
        batches += batches[-1:] * (-num_microbatches % group)

    def forward_step(data_iterator, chunk):
        output = forward(next(data_iterator), chunk)
        return output, lambda output, non_loss_data=True: output

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model],
        model=model,
        num_microbatches=len(batches),
        seq_length=1,  # shapes travel with the tensors (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[:num_microbatches]
