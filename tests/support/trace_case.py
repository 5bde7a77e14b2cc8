"""A run of `instruct` through the training loop, on rows that need no files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.instruct_stream import Reads
from megatron_kosmosg.data.samples import StreamDataset
from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.models.diffusion import load_diffusion
from megatron_kosmosg.monitoring import trace_exchange
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.rendezvous import meet
from megatron_kosmosg.score.connect import join_as_score_rank, open_remote_score
from megatron_kosmosg.score.generation import generate_images
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.service import serve
from megatron_kosmosg.score.wire import RunEnd
from megatron_kosmosg.stages.instruct import InstructStage
from megatron_kosmosg.training.loop import fit
from tests.support.tiny_stream import TinyStream

OpenStream = Callable[[str, Reads], StreamDataset]
"""The rows of a split for a rank that reads some of their parts."""


@dataclass(frozen=True)
class Pause:
    """Seconds that are slept in each piece of work, as if a device of its own were busy: what the
    schedule does then shows on a machine with few cores, too."""

    forward: float = 0.0
    """In the forward pass of a micro-batch on a decoder rank."""
    unet: float = 0.0
    """In the U-Net's work on a micro-batch on a score rank."""


def instruct_run(config: RunConfig, open_stream: OpenStream, pause: Pause) -> None:
    """This rank's part, decoder or score rank, of a run from random weights."""
    try:
        if platform.holds_unet_alone(config):
            rank = join_as_score_rank(config)
            diffusion = load_diffusion(config, rank.device)
            denoise = DenoisingLoss(diffusion, config.score, config.training.seed)
            with rank.membership:
                serve(
                    config,
                    rank,
                    _pausing(denoise, pause.unet),
                    partial(generate_images, config, diffusion),
                    lambda split: open_stream(split, "targets"),
                    diffusion.moments,
                )
            return
        context = platform.initialize(config)
        stage = InstructStage(config, context, open_remote_score(config, context))
        reads = "prompts" if context.num_score_ranks else "all"
        stage.build_dataset = lambda split: open_stream(split, reads)
        stage.initial_weights = lambda: None
        stage.forward_step = _pausing(stage.forward_step, pause.forward)
        assert fit(stage, config, context)
        if stage.remote_score is not None:
            stage.remote_score.close(RunEnd.DONE)
    finally:
        platform.teardown()


def tiny_run(config: RunConfig, pause: Pause) -> None:
    """The same on tiny rows."""
    instruct_run(config, partial(TinyStream, "instruct"), pause)


def _pausing(function: Callable, seconds: float) -> Callable:
    def pause_and_call(*arguments):
        time.sleep(seconds)
        return function(*arguments)

    return pause_and_call if seconds else function


def offset_of_wrong_clock(seconds: float) -> float:
    """What rank 1, on another node whose clock is that much ahead, adds to its time."""
    rank_info = find_rank_info()
    os.environ["SLURMD_NODENAME"] = f"node{rank_info.rank}"
    store = meet(rank_info, timedelta(seconds=60))
    if rank_info.rank == 1:
        trace_exchange.time = SimpleNamespace(time=lambda: time.time() + seconds)
    exchange = trace_exchange.TraceExchange(rank_info, 60)  # a connection of its own
    if rank_info.rank == 0:  # its process has the store: the other has to be done with it
        store.get("done")
    else:
        store.set("done", "")
    return exchange.clock_offset
