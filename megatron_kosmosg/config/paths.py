"""The files and folders of a run: their names inside its output folder."""

from __future__ import annotations

from pathlib import Path

from megatron_kosmosg.config.schema import RunConfig

METRICS_FILE, FAILURE_FILE = "metrics.jsonl", "failure.txt"
LOST_RANKS_FILE = "lost_ranks.txt"
"""Errors of ranks without which the run went on, of all its starts."""
COMPLETE_FILE = "complete.json"
"""In a checkpoint folder: its files, written last."""


def output_folder(config: RunConfig) -> Path:
    """The run's folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, packing/."""
    return Path(config.logging.output_dir)


def heartbeat_file(config: RunConfig) -> Path:
    """JSON with the time, iteration and phase of the run's latest sign of life."""
    return output_folder(config) / "heartbeat.json"


def trace_file(config: RunConfig) -> Path:
    """A Perfetto or Chrome trace of what all ranks did in iteration `logging.trace_iteration`."""
    return output_folder(config) / "trace.json"


def plan_file(config: RunConfig) -> Path:
    """JSON: what was planned for the run when it started, where its GPU is known."""
    return output_folder(config) / "plan.json"


def packing_folder(config: RunConfig) -> Path:
    """Folder of the indices that `pretrain` packs its rows by; may be deleted, is made anew."""
    return output_folder(config) / "packing"


def save_folder(config: RunConfig) -> Path:
    """Folder that holds this run's `iter_XXXXXXX` checkpoints."""
    if config.checkpoint.save is not None:
        return Path(config.checkpoint.save)
    return output_folder(config) / "checkpoints"
