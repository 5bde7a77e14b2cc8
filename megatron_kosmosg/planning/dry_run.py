"""What `--dry-run` prints: the resolved config, who does what, parameters and batch arithmetic.

Needs no process group, GPU, dataset or weights; 256 ranks are planned in one process.
"""

from __future__ import annotations

from pathlib import Path

from megatron_kosmosg.config.batching import (
    data_parallel_size,
    model_parallel_size,
    num_microbatches,
)
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import to_yaml
from megatron_kosmosg.config.needed_files import validate_files
from megatron_kosmosg.config.rank_grid import RankGrid, rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.planning.activations import ELEMENT_BYTES
from megatron_kosmosg.planning.gpus import Efficiency
from megatron_kosmosg.planning.host_memory import plan_host
from megatron_kosmosg.planning.memory import memory_table, rank_kinds
from megatron_kosmosg.planning.model_counts import (
    ModelCounts,
    bare_stage,
    count_model,
    frozen_helpers,
)
from megatron_kosmosg.planning.pipeline_balance import with_default_layout
from megatron_kosmosg.planning.rank_map import rank_table
from megatron_kosmosg.planning.workload import (
    assumed_kinds,
    micro_batches,
    mixture,
    with_kinds,
)
from megatron_kosmosg.stages import stage_facts

_RANKS_A_NODE = 8


def dry_run_report(config: RunConfig) -> str:
    """The whole report. Raises ConfigError if the layout does not fit the ranks."""
    world_size = planned_world_size(config)
    validate_layout(config, world_size, stage_facts(config.stage))
    config = with_default_layout(config)
    resolved, config = config, with_kinds(config)
    counts, world = count_model(config), rank_grid(config, world_size)
    sections = [
        ("Resolved config", to_yaml(resolved).rstrip()),
        (f"Ranks ({world_size})", rank_table(world)),
        ("Parameters", parameter_table(counts)),
        ("Parameters per rank", per_rank_table(config, world, counts)),
        ("Memory per rank", memory_section(config, world, counts)),
        ("Memory and disk of the machine", host_section(config, world, counts)),
        ("Batch", batch_table(config, world_size)),
        ("Files", _files(config)),
    ]
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{body}" for title, body in sections)


def planned_world_size(config: RunConfig) -> int:
    """Number of ranks of the run: parallel.world_size, else the ranks this was started with, else
    what one copy of the model needs."""
    if config.parallel.world_size is not None:
        return config.parallel.world_size
    return max(find_rank_info().world_size, model_parallel_size(config))


def parameter_table(counts: ModelCounts) -> str:
    """Trainable and frozen parameters of every part; padding and the tied copy left out."""
    rows = [(name, part.trainable, part.frozen) for name, part in counts.parts.items()]
    rows.append(("total", counts.trainable, counts.frozen))
    lines = [f"{'part':<16}{'trainable':>16}{'frozen':>16}{'all':>16}"]
    lines += [f"{n:<16}{t:>16,}{f:>16,}{t + f:>16,}" for n, t, f in rows]
    return "\n".join(lines)


def per_rank_table(config: RunConfig, world: RankGrid, counts: ModelCounts) -> str:
    """A table of what the ranks of each pipeline stage hold, and the score ranks."""
    lines = [
        f"pipeline rank {index}: {rank.trainable + rank.frozen:,} held, {rank.trainable:,} trained "
        f"on each of {world.num_replicas * world.tp_size} ranks\n  {rank.holds}"
        for index, rank in enumerate(counts.ranks)
    ]
    if world.score_ranks_per_unit:
        helpers = frozen_helpers(config)
        element = ELEMENT_BYTES[config.training.precision]
        named = ", ".join(f"{name} {count:,}" for name, count in helpers.items())
        lines.append(
            f"score ranks: {sum(helpers.values()):,} held ({named}; "
            f"{sum(helpers.values()) * element / 1e9:.2f} GB in {config.training.precision}), "
            f"none trained on each of {world.num_score_ranks} ranks\n"
            "  U-Net and VAE; no gradients, no optimizer state, no part of the decoder"
        )
    return "\n".join(lines)


def memory_section(config: RunConfig, world: RankGrid, counts: ModelCounts) -> str:
    """Peak of each kind of rank, as `kosmosg plan` reckons it."""
    if config.parallel.virtual_pipeline_model_parallel_size is not None:
        return "not planned for interleaved pipeline stages"
    batches = micro_batches(config, num_microbatches(config, world.num_replicas))
    kinds = rank_kinds(config, world, counts.shares, batches, Efficiency())
    return memory_table(kinds)


def host_section(config: RunConfig, world: RankGrid, counts: ModelCounts) -> str:
    """An upper bound, as `kosmosg plan` reckons it."""
    batches = micro_batches(config, num_microbatches(config, world.num_replicas))
    helpers = sum(frozen_helpers(config).values())
    parameters = counts.trainable, counts.frozen - helpers
    host = plan_host(config, world, counts.shares, batches, parameters, _RANKS_A_NODE)
    return "\n".join(host.lines())


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
    rows, longest = training.global_batch_size, mixture(config)[0]
    tokens = rows * longest.length
    flops = bare_stage(config).flops_per_iteration
    if stage_facts(config.stage).packs_rows:
        lines.append(
            f"{tokens:,} tokens an update ({rows} rows of {longest.length}; image slots count)"
        )
        without_images = flops(tokens, 0, rows)
        image = flops(tokens, 1, rows) - without_images
        lines.append(
            f"{without_images / 1e12:,.4g} TFLOP an update, and {image / 1e12:.3g} for each "
            "image in it"
        )
    else:
        work = flops(tokens, int(longest.prompt_images * rows), rows)
        prompt_images = f" with {longest.prompt_images:g} images" if longest.prompt_images else ""
        lines.append(
            f"{work / 1e12:,.4g} TFLOP an update for prompts of {longest.length} positions"
            f"{prompt_images}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in assumed_kinds(config))])


def _files(config: RunConfig) -> str:
    facts = stage_facts(config.stage)
    try:
        validate_files(config, facts)
    except ConfigError as error:
        return f"not ready on this machine: {error}"
    notes = ["everything the run reads is on this machine"]
    if "model.vision.path" in facts.folders and config.model.vision.path is None:
        notes.append("model.vision.path is null: the image tower starts from random weights")
    folder = config.model.diffusion.path
    if facts.has_unet and not (Path(folder or "") / "unet").is_dir():
        notes.append("U-Net and VAE counted at the sizes of Stable Diffusion v1.5")
    return "\n".join(notes)
