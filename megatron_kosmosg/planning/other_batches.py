"""Another number of samples an update, where the GPUs do not divide the batch; more GPUs, where no
layout fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.comparison import WORTH_SAYING, Faster, beside, in_words
from megatron_kosmosg.planning.estimate import Estimate
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.joined import JoinedRanks
from megatron_kosmosg.planning.search import PLACEMENTS, Candidate, NothingFits, search


def other_batches(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    efficiency: Efficiency,
    model: torch.nn.Module,
    joined: Sequence[JoinedRanks] = (),
) -> list[Candidate]:
    """The fastest layout of each multiple of the GPUs next to the batch; none where that is one.

    A multiple is what lets every GPU hold a replica, usually the fastest layout there is; where
    others have `joined`, every GPU but the fewest that have to be score ranks.
    """
    batch, found = config.training.global_batch_size, []
    replicas = _most_replicas(world_size) if joined else world_size
    lower = batch // replicas * replicas
    for size in (lower, lower + replicas) if batch % replicas else ():
        if not size:
            continue
        other = replace(config, training=replace(config.training, global_batch_size=size))
        try:
            result = search(other, world_size, gpu, efficiency, model, joined)
        except NothingFits:
            continue
        found.append(result.candidates[0])
    return found


def _most_replicas(world_size: int) -> int:
    """How many replicas of one GPU each there can be, beside score ranks that they share."""
    shared = [r for _, _, r in PLACEMENTS if world_size % (r + 1) == 0]
    most = max(shared, default=1)
    return max(1, world_size * most // (most + 1))


def faster_batches(
    config: RunConfig, planned: Estimate, candidates: list[Candidate]
) -> list[Faster]:
    """The batches of `other_batches` that are much faster than the plan of `config`, fastest
    first."""
    compared = [beside(config, planned, candidate) for candidate in candidates]
    worth = [faster for faster in compared if faster.times > WORTH_SAYING]
    return sorted(worth, key=lambda faster: -faster.times)


def nearest_batches(candidates: list[Candidate]) -> str:
    """The batches of `other_batches` in words; empty without any."""
    return "; ".join(
        f"training.global_batch_size={candidate.config.training.global_batch_size}: "
        f"{candidate.samples_per_second:,.0f} samples/s with {in_words(candidate)}"
        for candidate in candidates
    )


def more_gpus(
    config: RunConfig, world_size: int, gpu: Gpu, efficiency: Efficiency, model: torch.nn.Module
) -> str:
    """How many GPUs of this sort are enough (two, four or eight times as many), in words."""
    for more in (2 * world_size, 4 * world_size, 8 * world_size):
        try:
            best = search(config, more, gpu, efficiency, model).candidates[0]
        except NothingFits:
            continue
        return (
            f"{more} x {gpu.name} are enough: {best.samples_per_second:,.0f} samples/s with "
            f"{in_words(best)}"
        )
    return f"not even {more} are enough; take GPUs with more memory"
