"""Which settings may differ between a checkpoint and the run that continues it.

A setting that changes what is learnt is refused unless `checkpoint.accept_changes` names it. How
the same computation is laid out over ranks, logged, evaluated or stored may change freely.
"""

from __future__ import annotations

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import differences
from megatron_kosmosg.config.schema import RunConfig

FREE_TO_CHANGE = (
    "parallel",  # the sum is the same on every layout, up to rounding (dropout needs equal layouts)
    "checkpoint",
    "logging",
    "data.heldout",
    "data.num_workers",
    "data.image_backend",  # another decoder rounds pixels differently, nothing more
    "data.latent_cache",  # cached moments equal computed ones
    "data.max_bad_samples",
    "score.placement",
    "score.ranks_per_replica",
    "score.replicas_per_rank",
    "score.window",
    "score.recompute",
    "training.micro_batch_size",
    "training.recompute",
    "training.eval_interval",
    "training.eval_iters",
    "training.max_nonfinite_iters",
    "training.train_iters",  # refused below when it moves the end of the learning-rate decay
    "optimizer.lr_decay_iters",
)
"""Keys and sections; every other setting changes what is learnt."""


def check_resume(saved: RunConfig, current: RunConfig) -> list[str]:
    """One line per harmless difference between the checkpoint's config and this run's.

    Raises ConfigError naming all differences that change what is learnt and are not accepted.
    """
    accepted = current.checkpoint.accept_changes
    noted, refused = [], []
    for key, (old, new) in differences(saved, current).items():
        line = f"{key}: {old} -> {new}"
        free = _covers(FREE_TO_CHANGE, key)
        (noted if free or _covers(accepted, key) else refused).append(line)
    if _decay_end(saved) != _decay_end(current) and not _covers(accepted, "training.train_iters"):
        refused.append(
            f"training.train_iters: {saved.training.train_iters} -> "
            f"{current.training.train_iters} moves the end of the learning-rate decay; set "
            f"optimizer.lr_decay_iters={_decay_end(saved)} to keep it, or accept "
            "training.train_iters"
        )
    if refused:
        names = ", ".join(line.split(":", 1)[0] for line in refused)
        raise ConfigError(
            "the checkpoint was written with settings that change what is learnt:\n  "
            + "\n  ".join(refused)
            + f"\nuse the checkpoint's values, another logging.output_dir, or "
            f"checkpoint.accept_changes=[{names}]"
        )
    return noted


def _decay_end(config: RunConfig) -> int:
    if config.optimizer.lr_decay_style == "constant":
        return 0
    return config.optimizer.lr_decay_iters or config.training.train_iters


def _covers(names: list[str] | tuple[str, ...], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
