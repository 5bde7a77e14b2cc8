"""The schedule of an iteration whose U-Net sits on other ranks: 1F1B with more warm-up.

The score ranks are a pipeline stage behind the last one. A forward pass of the last sends a
condition and returns; its gradient is awaited in backward, when score.window conditions are under
way. With one pipeline stage the same loop is a window over the micro-batches. Passes without
gradients and interleaved pipeline stages take Megatron-Core's own schedules, where nothing runs
further ahead.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import (
    deallocate_output_tensor,
    forward_step,
    get_tensor_shapes,
)
from megatron.core.utils import get_model_config

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.core_versions import backward_step
from megatron_kosmosg.parallel.pipeline_link import PipelineLink, pipeline_schedule


def forward_backward_function(
    config: RunConfig,
    context: ParallelContext,
    model: torch.nn.Module,
    *,
    forward_only: bool,
    before_wait: Callable[[], None] = lambda: None,
) -> Callable[..., list]:
    """What runs the micro-batches of a global batch; arguments as of Megatron-Core's schedules.

    before_wait: what a rank does before it waits for gradients from score ranks, its own or, at the
        end of the update, those of a later pipeline stage; not in Megatron-Core's schedules.
    """
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    if context.num_score_ranks == 0 or forward_only or virtual is not None:
        return pipeline_schedule(context, get_model_config(model))

    def run(**arguments: Any) -> list:
        return _one_forward_one_backward(context, config.score.window - 1, before_wait, **arguments)

    return run


def _one_forward_one_backward(
    context: ParallelContext,
    extra: int,
    before_wait: Callable[[], None],
    *,
    forward_step_func: Callable,
    data_iterator: Any,
    model: torch.nn.Module,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
) -> list:
    """Reports of the micro-batches on the last pipeline stage, else an empty list."""
    assert not forward_only
    config, groups = get_model_config(model), context.process_groups
    link = PipelineLink(context, config)
    first, last = context.is_first_pipeline_stage, context.is_last_pipeline_stage
    shapes = get_tensor_shapes(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=seq_length,
        config=config,
        tp_group=groups.tp,
        cp_group=groups.cp,
    )
    ahead = min(context.pp_size - context.pp_rank - 1 + extra, num_microbatches)
    steady = num_microbatches - ahead
    reports: list = []
    kept: deque[tuple[Any, Any]] = deque()
    """Inputs and outputs whose backward pass is still to come."""
    num_items = torch.zeros((), dtype=torch.int, device=context.device)

    def forward(index: int, received: Any) -> Any:
        output, count = forward_step(
            forward_step_func,
            data_iterator,
            model,
            num_microbatches,
            received,
            reports,
            config,
            cp_group_size=1,
            is_first_microbatch=index == 0,
            current_microbatch=index,
            is_last_stage=last,
        )
        num_items.add_(count)
        return output

    def keep(received: Any, output: Any) -> None:
        # What was sent is needed for its graph alone.
        deallocate_output_tensor(output[0], config.deallocate_pipeline_outputs)
        kept.append((received, output))

    def backward(gradient: Any) -> Any:
        received, output = kept.popleft()
        return backward_step(received, output, gradient, model, config)

    # Gradients of replicas are reduced in the backward pass of the last micro-batch.
    quiet = contextlib.ExitStack()
    quiet.enter_context((config.no_sync_func or contextlib.nullcontext)())
    for index in range(ahead):
        received = link.recv_forward(shapes, first)
        output = forward(index, received)
        link.send_forward(output, last)
        keep(received, output)
    received = link.recv_forward(shapes, first) if steady else None
    for index in range(steady):
        output = forward(ahead + index, received)
        gradient = link.send_forward_recv_backward(output, shapes, last)
        keep(received, output)
        if last:
            before_wait()
        is_final = index == steady - 1
        if is_final and ahead == 0:
            quiet.close()
        to_send = backward(gradient)
        if is_final:
            link.send_backward(to_send, first)
        else:
            received = link.send_backward_recv_forward(to_send, shapes, first)
    for index in range(ahead):
        if index == ahead - 1:
            quiet.close()
        before_wait()
        gradient = link.recv_backward(shapes, last)
        link.send_backward(backward(gradient), first)
    quiet.close()
    config.finalize_model_grads_func([model], num_items, pg_collection=groups)
    return reports
