"""What a run needs before its first iteration: the model, its first weights, and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_kosmosg.checkpoint.folder import find_checkpoint
from megatron_kosmosg.checkpoint.save_and_resume import checkpoint_metadata
from megatron_kosmosg.checkpoint.weight_average import WeightAverage
from megatron_kosmosg.checkpoint.weights import load_weights
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.training.optimizer import build_lr_scheduler, build_optimizer
from megatron_kosmosg.training.stage import Stage
from megatron_kosmosg.training.step import configure_schedules
from megatron_kosmosg.training.wrapping import parameters_in, wrap_model


@dataclass(frozen=True)
class Trained:
    """A stage's model on this rank, and what updates it."""

    modules: Sequence[MegatronModule]
    """The model chunks without wrappers."""
    chunks: list[DistributedDataParallel]
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    average: WeightAverage | None
    """Of the weights (`optimizer.ema_decay`); None keeps none."""
    initial_from: Path | None
    """The checkpoint that filled the model, if one did."""


def build_trained(
    stage: Stage, config: RunConfig, context: ParallelContext, *, takes_initial_weights: bool
) -> Trained:
    """Collective over all ranks. takes_initial_weights: False for a run that is resumed, whose
    checkpoint fills the model afterwards."""
    with parameters_in(config.training.precision):
        modules = stage.build_model(context)
    _check_chunks(config, modules)
    initial_from = None
    if takes_initial_weights:
        initial_from = _take_initial_weights(stage, modules, context)
    chunks = wrap_model(modules, config)
    optimizer = build_optimizer(config, chunks)
    scheduler = build_lr_scheduler(config, optimizer)
    configure_schedules(chunks, optimizer, stage.remote_score)
    average, decay = None, config.optimizer.ema_decay
    if decay:
        average = WeightAverage(decay, modules, optimizer, context.process_groups.dp)
    return Trained(modules, chunks, optimizer, scheduler, average, initial_from)


def _check_chunks(config: RunConfig, modules: Sequence[MegatronModule]) -> None:
    needed = config.parallel.virtual_pipeline_model_parallel_size or 1
    if len(modules) != needed:
        raise ConfigError(
            f"stage {config.stage} builds {len(modules)} model chunks per rank, "
            f"parallel.virtual_pipeline_model_parallel_size asks for {needed}"
        )


def _take_initial_weights(
    stage: Stage, modules: Sequence[MegatronModule], context: ParallelContext
) -> Path | None:
    initial = stage.initial_weights()
    if initial is None:
        return None
    source = find_checkpoint(Path(initial.path))
    load_weights(
        source,
        modules,
        checkpoint_metadata(context),
        initial.absent,
        initial.unused,
        initial.stage,
        initial.new,
    )
    return source
