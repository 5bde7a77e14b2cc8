"""The files and folders that a run writes: where each of them lies.

All are in its output folder, but for the checkpoints where `checkpoint.save` names another folder.
What a run reads is in input_paths.py.
"""

from __future__ import annotations

from pathlib import Path

from megatron_kosmosg.config.schema import RunConfig

METRICS_FILE = "metrics.jsonl"
"""Name of the file of the run's numbers: a line of JSON for each iteration and evaluation."""
FAILURE_FILE = "failure.txt"
"""Name of the file with the error that ended the latest start; only of a start that failed."""
LOST_RANKS_FILE = "lost_ranks.txt"
"""Name of the file with the ends of ranks without which the run went on, of all its starts."""
SCORE_RANKS_FILE = "score_ranks.json"
"""Name of the file by which score ranks find the run, while it can be joined."""
COMPLETE_FILE = "complete.json"
"""Name of a file in each checkpoint's folder, not in the run's. It lists the checkpoint's files and
is written last, so a folder without it is no whole checkpoint."""


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
