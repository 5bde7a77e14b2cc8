"""Peak bytes of tensors in a real training update, from a tracker that sees every storage."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from megatron.core.utils import get_model_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.instruct_stream import Reads
from megatron_kosmosg.models.diffusion import load_diffusion
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.pipeline_link import pipeline_schedule
from megatron_kosmosg.score.connect import join_as_score_rank, open_remote_score
from megatron_kosmosg.score.generation import generate_images
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.service import serve
from megatron_kosmosg.score.wire import RunEnd
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.optimizer import apply_update, build_optimizer, squared_gradient_norm
from megatron_kosmosg.training.step import _run_schedule, configure_schedules
from megatron_kosmosg.training.wrapping import wrap_model
from tests.support.tiny_models import random_batch
from tests.support.tiny_stream import TinyStream


class StorageTracker(TorchDispatchMode):
    """Bytes of all storages that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def see(self, value) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return

        def freed(_reference) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self.see(value)
        return result


class LongRows(TinyStream):
    """Rows of data.seq_length, every second one with an image."""

    def __init__(self, config: RunConfig, reads: Reads) -> None:
        super().__init__(config.stage, reads=reads)
        self._length = config.data.seq_length

    def lengths(self, positions: Sequence[int]) -> np.ndarray:
        return np.full(len(positions), self._length)


def measured_apart(config: RunConfig) -> dict[str, int]:
    """The same as `measured_bytes` where the U-Net has ranks of its own, for either kind of rank.

    Micro-batches of LongRows.
    """
    try:
        if platform.holds_unet_alone(config):
            return _measured_score_rank(config)
        with StorageTracker() as tracker:
            context = platform.initialize(config)
            stage = build_stage(config, context, open_remote_score(config, context))
            chunks = wrap_model(stage.build_model(context), config)
            optimizer = build_optimizer(config, chunks)
            configure_schedules(chunks, optimizer, stage.remote_score)
            parameters = [p for chunk in chunks for p in chunk.parameters()]
            for parameter in parameters:
                tracker.see(parameter.data)
            feed = BatchFeed(LongRows(config, "prompts"), config, context, start_sample=0)
            for _ in range(2):
                for chunk in chunks:
                    chunk.zero_grad_buffer()
                optimizer.zero_grad()
                tracker.peak = kept = tracker.now
                _run_schedule(stage, config, context, chunks, [iter(feed)], forward_only=False)
                peak = tracker.peak
                apply_update(
                    optimizer, 1.0, math.sqrt(squared_gradient_norm(optimizer, context.device))
                )
        feed.close()
        stage.remote_score.close(RunEnd.DONE)
        return {"kept": kept, "peak": peak, "parameters": sum(p.nbytes for p in parameters)}
    finally:
        platform.teardown()


def _measured_score_rank(config: RunConfig) -> dict[str, int]:
    rank = join_as_score_rank(config)
    with StorageTracker() as tracker:
        diffusion = load_diffusion(config, rank.device)
        parameters = [p for m in (diffusion.unet, diffusion.vae) for p in m.parameters()]
        for parameter in parameters:  # read from files, unseen so far
            tracker.see(parameter.data)
        kept = tracker.now
        tracker.peak = kept
        with rank.membership:
            serve(
                config,
                rank,
                DenoisingLoss(diffusion, config.score, config.training.seed),
                partial(generate_images, config, diffusion),
                lambda split: LongRows(config, "targets"),
                diffusion.moments,
            )
    return {
        "kept": kept,
        "peak": tracker.peak,
        "parameters": sum(p.nbytes for p in parameters),
    }


def measured_bytes(config: RunConfig, rows: int, length: int) -> dict[str, int]:
    """On this rank: `kept` between updates, `peak` of an update, `parameters` by requires_grad."""
    context = platform.initialize(config)
    try:
        with StorageTracker() as tracker:
            stage = build_stage(config, context)
            chunks = wrap_model(stage.build_model(context), config)
            optimizer = build_optimizer(config, chunks)
            configure_schedules(chunks, optimizer, stage.remote_score)
            frozen = []
            if (
                config.stage == "instruct" and context.is_last_pipeline_stage
            ):  # read from files, unseen so far
                frozen = [stage._diffusion.unet, stage._diffusion.vae]
            for module in [*chunks, *frozen]:
                for parameter in module.parameters():
                    tracker.see(parameter.data)
            count = num_microbatches(config, context.dp_size)
            for _ in range(2):
                for chunk in chunks:
                    chunk.zero_grad_buffer()
                optimizer.zero_grad()
                tracker.peak = kept = tracker.now
                batches = (random_batch(config.stage, rows, length, seed) for seed in range(count))
                pipeline_schedule(context, get_model_config(chunks[0]))(
                    forward_step_func=stage.forward_step,
                    data_iterator=batches,
                    model=chunks[0],
                    num_microbatches=count,
                    seq_length=length,
                    micro_batch_size=rows,
                    forward_only=False,
                )
                peak = tracker.peak
                apply_update(
                    optimizer, 1.0, math.sqrt(squared_gradient_norm(optimizer, context.device))
                )
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        return {
            "kept": kept,
            "peak": peak,
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        }
    finally:
        platform.teardown()
