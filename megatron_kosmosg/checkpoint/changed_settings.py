"""Which settings may differ between a checkpoint and the run that continues it.

A setting that changes what is learnt is refused unless `checkpoint.accept_changes` names it. How
the same computation is laid out over ranks, logged, evaluated or stored may change freely.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.input_paths import is_input_path, is_same_input
from megatron_kosmosg.config.load import config_differences
from megatron_kosmosg.config.schema import RunConfig

FREE_TO_CHANGE = (
    "parallel",  # the sum is the same on every layout, up to rounding (dropout needs equal layouts)
    "checkpoint",
    "evaluation",
    "logging",
    "performance",  # the same passes up to rounding, which is checked at the start
    "data.heldout",
    "data.num_workers",
    "data.balance_tokens",  # the same samples, added up in another order
    "data.image_backend",  # another decoder rounds pixels differently, nothing more
    "data.latent_cache",  # cached latents equal computed ones
    "data.max_bad_images",
    "score.placement",
    "score.ranks_per_replica",
    "score.replicas_per_rank",
    "score.window",
    "score.recompute",
    "score.answer_seconds",
    "score.wait_seconds",
    "score.audit_rate",
    "score.listen_address",
    "training.micro_batch_size",
    "training.recompute",
    "training.eval_interval",
    "training.eval_iters",
    "training.max_nonfinite_iters",
    "training.train_iters",  # refused below when it moves the end of the learning-rate decay
    "optimizer.lr_decay_iters",
    "optimizer.optimizer_cpu_offload",  # the same updates up to rounding
    "optimizer.optimizer_offload_fraction",
    "optimizer.ema_decay",  # what is averaged does not depend on the average
)
"""Keys and sections; every other setting changes what is learnt."""


def check_resume(
    saved: RunConfig,
    current: RunConfig,
    saved_data: Mapping[str, str] = MappingProxyType({}),
    current_data: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """One line per harmless difference between the checkpoint's config and this run's.

    Args:
        saved_data, current_data: fingerprint of each dataset of data.blend, by name; a dataset that
            only moved may, one of other content may not.

    Raises ConfigError naming all differences that change what is learnt and are not accepted.
    """
    accepted = current.checkpoint.accept_changes
    both = saved_data.keys() & current_data.keys()
    moved = [f"data.blend.{name}.path" for name in both if saved_data[name] == current_data[name]]
    changed = {
        key: f"{old} -> {new}"
        for key, (old, new) in config_differences(saved, current).items()
        if not (is_input_path(key) and is_same_input(old, new))
    }
    for name in sorted(both):
        if saved_data[name] != current_data[name]:
            path = current.data.blend[name].path
            changed[f"data.blend.{name}.content"] = (
                f"the dataset {path} is not the one of the checkpoint (fingerprint "
                f"{saved_data[name]} -> {current_data[name]})"
            )
    names, names_now = list(saved.data.blend), list(current.data.blend)
    if names != names_now and sorted(names) == sorted(names_now):
        changed["data.blend"] = f"order {', '.join(names)} -> {', '.join(names_now)}"
    noted, refused = [], []
    for key, change in changed.items():
        line = f"{key}: {change}"
        free = _covers(FREE_TO_CHANGE, key) or key in moved or _states_a_kind(key)
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


def _states_a_kind(key: str) -> bool:
    """Whether the key is a data.blend.NAME.kind, which only repeats what the dataset's manifest
    says."""
    return key.startswith("data.blend.") and key.endswith(".kind")


def _covers(names: list[str] | tuple[str, ...], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
