"""What `--dry-run` prints: the resolved config, who does what, parameters and batch arithmetic.

Needs no process group, GPU, dataset or weights; 256 ranks are planned in one process.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_kosmosg.config.batching import (
    data_parallel_size,
    model_parallel_size,
    num_microbatches,
)
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import to_yaml
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.validate import validate_files, validate_layout
from megatron_kosmosg.config.world import world_layout
from megatron_kosmosg.parallel.rendezvous import find_place
from megatron_kosmosg.planning import flops
from megatron_kosmosg.planning.model_counts import ModelCounts, count_model
from megatron_kosmosg.planning.rank_map import rank_table
from megatron_kosmosg.planning.workload import kinds


def describe(config: RunConfig) -> str:
    """The whole report. Raises ConfigError if the layout does not fit the ranks."""
    world_size = planned_world_size(config)
    validate_layout(config, world_size)
    counts = count_model(config)
    sections = [
        ("Resolved config", to_yaml(config).rstrip()),
        (f"Ranks ({world_size})", rank_table(world_layout(config, world_size))),
        ("Parameters", parameter_table(counts)),
        ("Parameters per rank", per_rank_table(config, world_size, counts)),
        ("Batch", batch_table(config, world_size)),
        ("Files", _files(config)),
    ]
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{body}" for title, body in sections)


def planned_world_size(config: RunConfig) -> int:
    """parallel.world_size, else the ranks this was started with, else one copy of the model."""
    if config.parallel.world_size is not None:
        return config.parallel.world_size
    return max(find_place(os.environ).world_size, model_parallel_size(config))


def parameter_table(counts: ModelCounts) -> str:
    """Trainable and frozen parameters of every part; padding and the tied copy left out."""
    rows = [(name, part.trainable, part.frozen) for name, part in counts.parts.items()]
    rows.append(("total", counts.trainable, counts.frozen))
    lines = [f"{'part':<16}{'trainable':>16}{'frozen':>16}{'all':>16}"]
    lines += [f"{n:<16}{t:>16,}{f:>16,}{t + f:>16,}" for n, t, f in rows]
    return "\n".join(lines)


def per_rank_table(config: RunConfig, world_size: int, counts: ModelCounts) -> str:
    """What the ranks of each pipeline stage hold, and the optimizer state they keep."""
    dp_size = data_parallel_size(config, world_size)
    sharing = dp_size if config.parallel.use_distributed_optimizer else 1
    lines = []
    for index, rank in enumerate(counts.ranks):
        state = rank.trainable / sharing * 12 / 2**30  # fp32 main copy and two Adam moments
        lines.append(
            f"pipeline stage {index}: {rank.trainable + rank.frozen:,} held, "
            f"{rank.trainable:,} trained, {state:.2f} GiB optimizer state per rank\n"
            f"  {rank.pieces}"
        )
    return "\n".join(lines)


def batch_table(config: RunConfig, world_size: int) -> str:
    """Micro-batches, samples, positions and FLOPs of one update and of the run."""
    training = config.training
    dp_size = data_parallel_size(config, world_size)
    microbatches = num_microbatches(config, dp_size)
    lines = [
        f"{training.global_batch_size} samples an update = {training.micro_batch_size} per "
        f"micro-batch x {microbatches} micro-batches x {dp_size} replicas",
        f"{training.global_batch_size * training.train_iters:,} samples in "
        f"{training.train_iters:,} updates",
    ]
    rows, length = training.global_batch_size, config.data.seq_length
    if config.stage == "pretrain":
        tokens = rows * length
        lines.append(f"{tokens:,} tokens an update ({rows} rows of {length}; image slots count)")
        without_pictures = flops.pretrain_flops(config, tokens, 0)
        picture = flops.pretrain_flops(config, tokens, 1) - without_pictures
        lines.append(
            f"{without_pictures / 1e12:,.4g} TFLOP an update, and {picture / 1e12:.3g} for each "
            "picture in it"
        )
    else:
        typical = kinds(config)[0].length
        work = (
            flops.align_flops(config, rows * typical, rows)
            if config.stage == "align"
            else flops.instruct_flops(config, rows * typical, 2 * rows, rows)
        )
        pictures = "" if config.stage == "align" else " with two pictures"
        lines.append(
            f"{work / 1e12:,.4g} TFLOP an update for prompts of {typical} positions{pictures}"
        )
    return "\n".join(lines)


def _files(config: RunConfig) -> str:
    try:
        validate_files(config)
    except ConfigError as error:
        return f"not ready on this machine: {error}"
    notes = ["everything the run reads is on this machine"]
    if config.stage == "pretrain" and config.model.vision.path is None:
        notes.append("model.vision.path is null: the image tower starts from random weights")
    folder = config.model.diffusion.path
    if config.stage == "instruct" and not (Path(folder or "") / "unet").is_dir():
        notes.append("U-Net and VAE counted at the sizes of Stable Diffusion v1.5")
    return "\n".join(notes)
