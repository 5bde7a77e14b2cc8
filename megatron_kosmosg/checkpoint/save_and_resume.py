"""Saving and resuming a run through Megatron-Core's distributed checkpoints.

One checkpoint holds model, optimizer, learning-rate schedule, progress, the config and every
rank's random state; any tensor/pipeline/data layout loads any other. Random state is only taken
back on the layout and kind of device that wrote it: elsewhere the streams restart from the seed and
the iteration.
Where only trained weights are saved (`checkpoint.weights`) the others are read from the checkpoint
that they came from, which the save names (base_record.py).

Long because saving and resuming are one contract.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_kosmosg.checkpoint import folder as checkpoint_folder
from megatron_kosmosg.checkpoint.base_checkpoint import (
    base_is_there,
    find_base,
    hold_base,
    weight_folders,
)
from megatron_kosmosg.checkpoint.base_record import Base, read_base, write_base
from megatron_kosmosg.checkpoint.changed_settings import check_resume
from megatron_kosmosg.checkpoint.checkpoint_errors import explain_write_errors, load_state
from megatron_kosmosg.checkpoint.layout_signature import compare_layouts, layout_signature
from megatron_kosmosg.checkpoint.left_out import frozen_weights, without
from megatron_kosmosg.checkpoint.optimizer_form import FormChange
from megatron_kosmosg.checkpoint.optimizer_state import (
    add_local_settings,
    drop_local_settings,
    restore_settings,
    set_num_updates,
)
from megatron_kosmosg.checkpoint.plain_data import read_common
from megatron_kosmosg.checkpoint.rng_state import (
    OTHER_DEVICE,
    fits_this_device,
    restore_rng_state,
    rng_state,
)
from megatron_kosmosg.checkpoint.weight_average import AVERAGE, WeightAverage
from megatron_kosmosg.checkpoint.weights import (
    MODEL,
    model_state,
    read_model_state,
    select,
    set_model_state,
)
from megatron_kosmosg.checkpoint.writer import BackgroundSave, ThreadSaveStrategy
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_saved_config, to_yaml
from megatron_kosmosg.config.paths import save_folder
from megatron_kosmosg.config.saved_weights import saves_trained_alone
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.core_versions import adopt_learning_rates
from megatron_kosmosg.parallel.seeds import set_seeds

logger = logging.getLogger(__name__)

OPTIMIZER_SHARDING = "fully_reshardable"
"""Megatron-Core's name for a state by parameter, which any layout takes."""


@dataclass
class TrainingProgress:
    """How far a run has come; equal on all ranks."""

    iteration: int = 0
    consumed_train_samples: int = 0
    updates: int = 0
    """Iterations that changed the parameters."""
    nonfinite_in_a_row: int = 0
    bad_samples: int = 0
    """Images that could not be decoded, over all iterations."""


def checkpoint_metadata(context: ParallelContext) -> dict[str, Any]:
    """What `sharded_state_dict` of model and optimizer must know: optimizer state is stored per
    parameter, so that it can be split anew for another layout."""
    return {"distrib_optim_sharding_type": OPTIMIZER_SHARDING, "dp_cp_group": context.dp_group}


class Checkpointer:
    """Saves and restores one run. All methods are collectives over all ranks."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        chunks: Sequence[MegatronModule],
        optimizer: ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
        datasets: dict[str, str],
        average: WeightAverage | None = None,
        initial_from: Path | None = None,
    ) -> None:
        """Saves and loads the state of what it is given here; `config` says where.

        Args:
            chunks: the stage's bare modules, without Megatron-Core's wrappers.
            datasets: fingerprint of each dataset of the mixture, by name; saved, and compared on
                resuming.
            average: the average of the weights, where one is kept.
            initial_from: the checkpoint from which the chunks have just been filled, if one was.
        """
        self._config, self._context = config, context
        self._chunks, self._optimizer, self._scheduler = chunks, optimizer, scheduler
        self._datasets, self._average = datasets, average
        self._folder = save_folder(config)
        self._background = BackgroundSave()
        self._saving = 0
        """Iteration of the latest save."""
        self._base: Base | None = None
        """What saves leave out."""
        self._held: Base | None = None
        """That of which this process has tried to hold the files."""
        if initial_from is not None and saves_trained_alone(config):
            models = model_state(chunks, checkpoint_metadata(context))
            self._base = frozen_weights(models, initial_from, weight_folders(initial_from).keys())

    def save(self, progress: TrainingProgress) -> None:
        """Writes `iter_XXXXXXX`; with checkpoint.async_save it appears some iterations later."""
        self.wait()
        self._saving = progress.iteration
        with explain_write_errors(self._folder, self._saving):
            self._save(progress)

    def poll(self) -> None:
        """Gives a background save its final name once all ranks have written."""
        with explain_write_errors(self._folder, self._saving):
            self._background.poll(self._context.device)

    def wait(self) -> None:
        """Returns when no save is under way any more."""
        with explain_write_errors(self._folder, self._saving):
            self._background.wait()

    def resume(self, path: Path) -> tuple[TrainingProgress, list[str]]:
        """Progress of the checkpoint after loading all of it, and notes for the log.

        Raises ConfigError if the config changes what is learnt (checkpoint/changed_settings.py),
        if the checkpoint holds weights alone, or if its frozen weights are gone; DamagedCheckpoint
        if it cannot be read.
        """
        saved_config = load_saved_config(path / checkpoint_folder.CONFIG_FILE)
        common = read_common(path)
        if "progress" not in common:
            raise ConfigError(
                f"{path} holds weights alone (it was imported), so there is no run to continue; "
                f"set checkpoint.load={path.parent} and save this run into another folder "
                "(logging.output_dir, checkpoint.save)"
            )
        notes = check_resume(saved_config, self._config, common.get("datasets", {}), self._datasets)
        same_layout, layout_notes = compare_layouts(common["layout"], self._layout_signature())
        notes += layout_notes
        strategy = get_default_load_sharded_strategy(str(path))
        if self._context.dp_size > 1:
            strategy = FullyParallelLoadStrategyWrapper(strategy, self._context.dp_group)
        sharded_state = self._state(TrainingProgress(), is_loading=True)
        folders = weight_folders(path, self._config.checkpoint.load)
        models = {name: part for name, part in sharded_state.items() if name.startswith(MODEL)}
        of_base = {key: folder for key, folder in folders.items() if folder != path}
        if of_base:
            own = {name: select(part, folders, path) for name, part in models.items()}
            sharded_state.update(own)
        if not same_layout:
            del sharded_state["rng"]
        if self._average is not None and AVERAGE not in common:
            del sharded_state[AVERAGE]
            notes.append(
                "the checkpoint holds no average of the weights (optimizer.ema_decay): it begins "
                "with the checkpoint's weights"
            )
        form = FormChange(saved_config, self._config, OPTIMIZER_SHARDING)
        form.adapt_request(sharded_state)
        loaded = load_state(path, sharded_state, strategy)
        form.adapt_loaded(sharded_state, loaded)
        for name, values in read_model_state(models, of_base).items():
            loaded.setdefault(name, {}).update(values)
        set_model_state(self._chunks, loaded)
        progress = TrainingProgress(**loaded["progress"])
        settings = self._config.optimizer
        adopt_learning_rates(loaded["optimizer"], settings.lr, settings.min_lr)
        add_local_settings(self._optimizer, loaded["optimizer"])
        with torch.no_grad():  # Megatron-Core copies into fp32 parameters in place
            self._optimizer.load_state_dict(loaded["optimizer"])
        restore_settings(self._config, self._optimizer, progress.updates)
        self._scheduler.load_state_dict(loaded["scheduler"])
        self._resume_average(loaded)
        self._leave_out(path, folders)
        if same_layout and fits_this_device(loaded["rng"]):
            restore_rng_state(loaded["rng"])
        else:
            if same_layout:
                notes.append(OTHER_DEVICE)
            set_seeds(self._config.training.seed + progress.iteration, self._context)
        return progress, notes

    def _leave_out(self, path: Path, folders: dict[str, Path]) -> None:
        """Lets saves take what is frozen from where `path` has taken it, or from `path` where it
        holds all weights itself."""
        if not saves_trained_alone(self._config):
            self._base = None
            return
        models = model_state(self._chunks, checkpoint_metadata(self._context))
        taken = read_base(path)
        if taken is None:
            self._base = frozen_weights(models, path, folders.keys())
        else:
            base = find_base(path, taken, self._config.checkpoint.load)
            self._base = frozen_weights(models, base, taken.weights.keys())

    def _resume_average(self, loaded: dict[str, Any]) -> None:
        if self._average is None:
            return
        if AVERAGE in loaded:
            models = model_state(self._chunks, checkpoint_metadata(self._context))
            self._average.load(models, loaded[AVERAGE])
        else:
            self._average.restart()

    def _save(self, progress: TrainingProgress) -> None:
        set_num_updates(self._optimizer, progress.updates)
        agreed: list[Any] = ["", None]
        if self._context.rank == 0:
            temporary = checkpoint_folder.begin(self._folder, progress.iteration)
            agreed = [str(temporary), self._base_in_place()]
        dist.broadcast_object_list(agreed, src=0)
        temporary, base = Path(agreed[0]), agreed[1]
        is_async = self._config.checkpoint.async_save
        strategy = ThreadSaveStrategy(in_background=is_async)
        if self._context.dp_size > 1:  # replicas share the writing
            strategy = FullyParallelSaveStrategyWrapper(strategy, self._context.dp_group)
        state = self._state(progress, is_loading=False)
        if base is not None:
            models = {name: part for name, part in state.items() if name.startswith(MODEL)}
            state.update(without(models, base))
        request = dist_checkpointing.save(
            state,
            str(temporary),
            strategy,
            async_sharded_save=is_async,
        )
        if request is None:
            self._complete(temporary, base)
        else:
            request.add_finalize_fn(lambda: self._complete(temporary, base))
            self._background.start(request)

    def _base_in_place(self) -> Base | None:
        """What this save leaves out: nothing where the base has been removed meanwhile, since the
        run's memory then has the only copy."""
        base = self._base
        if base is None:
            return None
        if not base_is_there(self._folder, base):
            logger.warning(
                "checkpoint %s is not there any more; this save holds the frozen weights, too",
                base.path,
            )
            return None
        if self._held != base:
            self._held = base
            try:
                hold_base(self._folder, base)
            except (OSError, ConfigError) as error:
                logger.warning(
                    "the checkpoints of this run need %s, which must stay: no links to it (%s)",
                    base.path,
                    error,
                )
        return base

    def _state(self, progress: TrainingProgress, *, is_loading: bool) -> dict[str, Any]:
        metadata = checkpoint_metadata(self._context)
        models = model_state(self._chunks, metadata)
        flat = models["model0"] if len(models) == 1 else models
        average = self._average
        optimizer = self._optimizer.sharded_state_dict(
            flat, is_loading=is_loading, metadata=metadata
        )
        drop_local_settings(self._optimizer, optimizer)
        return {
            **models,
            **({AVERAGE: average.state(models, is_loading=is_loading)} if average else {}),
            "optimizer": optimizer,
            "scheduler": self._scheduler.state_dict(),
            "progress": asdict(progress),
            "layout": self._layout_signature(),
            "datasets": self._datasets,
            "rng": ShardedObject(
                "rng", rng_state(), (self._context.world_size,), (self._context.canonical_rank,)
            ),
        }

    def _layout_signature(self) -> dict[str, Any]:
        return layout_signature(self._context, self._config.parallel)

    def _complete(self, temporary: Path, base: Base | None) -> None:
        if self._context.rank == 0:
            if base is not None:
                write_base(temporary, base)
            checkpoint_folder.finish(temporary, to_yaml(self._config))
            kept = self._config.checkpoint
            checkpoint_folder.prune(self._folder, kept.keep_last, kept.keep_every)
        dist.barrier()
