"""One training update of one rank, by the program's own start-up and step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.planning.gpus import gpu_named
from megatron_kosmosg.planning.pipeline_balance import with_default_layout
from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.frozen_files import with_frozen_folders
from megatron_kosmosg.rehearsal.made_up_stream import MadeUpStream
from megatron_kosmosg.rehearsal.stand_ins import StandIns
from megatron_kosmosg.score.connect import open_remote_score
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.optimizer import check_optimizer
from megatron_kosmosg.training.setup import Trained, build_trained
from megatron_kosmosg.training.stage import Stage
from megatron_kosmosg.training.step import Reporter, forward_losses, train_step

UPDATE = "update"
"""Phase of everything between the micro-batches and around them."""


def run_config(case: RehearsalCase) -> RunConfig:
    """The run's config; data are read in the thread that the stand-ins know."""
    overrides = [*case.overrides, f"parallel.world_size={case.world_size}", "data.num_workers=0"]
    return with_default_layout(load_config(case.config, overrides))


def resolved_config(case: RehearsalCase, stand_ins: StandIns) -> RunConfig:
    """The config of the case with frozen models whose sizes are on this machine."""
    return with_frozen_folders(run_config(case), stand_ins.folder)


def take_rank(case: RehearsalCase, stand_ins: StandIns) -> None:
    """Makes this process the case's rank, as torchrun would; says what other ranks would."""
    os.environ.update(
        RANK=str(case.rank),
        WORLD_SIZE=str(case.world_size),
        LOCAL_RANK="0",
        MASTER_ADDR="the-first-node",  # a name: for an address of its own, rank 0 would listen
        MASTER_PORT="1",
    )
    collectives = stand_ins.collectives
    stand_ins.numbers.flag = case.upstream_trains
    collectives.store.values.update(case.store_values)
    collectives.announced = case.received
    stand_ins.gpu.kind = gpu_named(case.gpu)


def run_update(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """Runs updates of the case's rank. Returns {"phases": counts of the last update, "timeline":
    its memory, "num_micro_batches": in it, "held": bytes between updates, "trains": whether
    anything does on this rank or before it, "sent": shapes by rank, "told": through the store}."""
    config, recorder = resolved_config(case, stand_ins), stand_ins.recorder
    take_rank(case, stand_ins)
    with stand_ins.device():
        rank = start_rank(config, case, stand_ins)
        for number in range(case.num_updates):
            if number:
                recorder.forget()
            recorder.restart_timeline()
            with recorder.phase(UPDATE):
                rank.update()
    is_behind_others = rank.context.pp_rank > 0
    return {
        "phases": recorder.as_dict(),
        "timeline": recorder.timeline(),
        "num_micro_batches": num_microbatches(config, rank.context.dp_size),
        "held": rank.held,
        "trains": rank.held["optimizer"] > 0 or (is_behind_others and case.upstream_trains),
        "sent": stand_ins.collectives.sent,
        "told": stand_ins.collectives.store.values,
    }


@dataclass(frozen=True)
class Rank:
    """A rank that has started and can train."""

    stage: Stage
    config: RunConfig
    context: ParallelContext
    trained: Trained
    feed: BatchFeed
    iterators: list[Iterator]
    reporter: Reporter
    held: dict[str, int]
    """Bytes between updates: `frozen_helpers` (U-Net and VAE, or the text encoder), `model`
    (parameters and gradients), `optimizer`, and the `total`."""

    def update(self) -> None:
        """Makes one update, as the training loop does."""
        for chunk in self.trained.chunks:
            chunk.train()
        parts = self.stage, self.config, self.context, self.trained.chunks, self.trained.optimizer
        train_step(*parts, self.feed, self.iterators, self.reporter, self.trained.average)

    def evaluate(self) -> None:
        """The forward passes of one global batch, as an evaluation makes them."""
        for chunk in self.trained.chunks:
            chunk.eval()
        parts = self.stage, self.config, self.context, self.trained.chunks
        with torch.no_grad():
            forward_losses(*parts, self.feed, self.iterators, self.reporter)


def start_rank(config: RunConfig, case: RehearsalCase, stand_ins: StandIns) -> Rank:
    """Starts the rank up to its first update."""
    memory, collectives = stand_ins.recorder.memory, stand_ins.collectives
    context = platform.initialize(config)
    check_optimizer(config, context.device)
    remote_score = open_remote_score(config, context)
    stage = build_stage(config, context, remote_score)
    helpers = memory.now
    # Megatron-Core gives all ranks the parameter groups of all; where something trains it is one.
    collectives.gathered_object = [(None, False)]
    trained = build_trained(stage, config, context, takes_initial_weights=False)
    parameters: list[Any] = [
        parameter for chunk in trained.chunks for parameter in chunk.parameters()
    ]
    memory.see_all(parameters)
    gradients = [parameter.main_grad for parameter in parameters if parameter.requires_grad]
    model = memory.size([*parameters, *gradients])
    held = {"frozen_helpers": helpers, "model": model, "total": memory.now}
    held["optimizer"] = memory.now - helpers - model
    stream: Any = MadeUpStream(
        config,
        case.length,
        case.images,
        reads="all" if remote_score is None else "prompts",
        decodes=context.is_first_pipeline_stage,
    )
    feed = BatchFeed(stream, config, context, start_sample=0)
    iterators = feed.chunk_iterators(len(trained.chunks))
    # The names of the losses, which the last pipeline stage knows.
    collectives.gathered_object = ["loss"]
    reporter = Reporter(context, remote_score)
    return Rank(stage, config, context, trained, feed, iterators, reporter, held)
