"""The plan of a fleet of score ranks against a simulation that has the plan's service times.

The plan gives every request to the rank that would answer first; the simulation
(benchmarks/score_fleet.py) lets each replica choose by the program's own bookkeeping, without and
with a spread of all times. 8 micro-batches of 16 rows; one score rank of the job for 8 replicas.

    python -m benchmarks.fleet_against_plan --gpu h100-80 --score-gpu l40s
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.score_fleet import Fleet, Times, measured
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.estimate import estimate
from megatron_kosmosg.planning.gpus import Efficiency, Gpu, gpu_named
from megatron_kosmosg.planning.joined import JoinedRanks, joined_ranks, play_joined, unit_servers
from megatron_kosmosg.planning.model_counts import ModelShares, model_shares, whole_model
from megatron_kosmosg.planning.pipeline_stage_cost import pipeline_stage_cost
from megatron_kosmosg.planning.rates import Rates
from megatron_kosmosg.planning.workload import score_share

REPLICAS = (8, 64)
JOINED = (0, 0.25, 0.5, 1, 2)
"""For each replica."""
ROWS, MICRO_BATCHES, SHARING = 16, 8, 8
AGREES = 0.1
"""Share of the plan from which a simulation of 8 replicas and two that joined may differ."""


@dataclass(frozen=True)
class Compared:
    """Images/s of one fleet."""

    planned: float
    simulated: float
    """All times as planned."""
    spread: float
    """With a standard deviation of a tenth."""


def shared_layout(replicas: int) -> RunConfig:
    """`instruct_256gpu` with one score rank of the job for 8 replicas."""
    return load_config(
        "instruct_256gpu",
        [
            "model.diffusion.path=null",
            f"parallel.world_size={replicas + replicas // SHARING}",
            f"score.replicas_per_rank={SHARING}",
            f"training.micro_batch_size={ROWS}",
            f"training.global_batch_size={replicas * ROWS * MICRO_BATCHES}",
        ],
    )


def compare(
    config: RunConfig, gpu: Gpu, joined: Sequence[JoinedRanks], shares: ModelShares, updates: int
) -> Compared:
    """joined: at most one sort. shares: `model_shares` of `config`, without pipeline stages."""
    efficiency, images = Efficiency(), config.training.global_batch_size
    world = rank_grid(config, config.parallel.world_size or 1)
    planned = estimate(config, world, gpu, efficiency, shares, joined)
    batches = planned.micro_batches
    rates = Rates(gpu, config.training.precision, efficiency)
    scored = score_share(config, world, len(batches))
    cost = pipeline_stage_cost(config, world, 0, shares.specs[0], batches, gpu, rates)
    own = unit_servers(config, world, scored, rates)
    played = play_joined(config, world, [cost], scored, rates, joined)
    rest = planned.seconds - played.timeline.seconds  # exchange of gradients, optimizer

    def simulated(spread: float) -> float:
        times = Times(cost.forward, cost.backward, spread)
        fleet = Fleet(world.num_replicas, config.score.window, times)
        for first in range(0, world.num_replicas, world.replicas_per_unit):
            served = range(first, first + world.replicas_per_unit)
            for _ in range(own.count):
                fleet.join(own.seconds, 2 * own.link, own_of=served)
        for servers in played.servers:
            for _ in range(servers.count):
                fleet.join(servers.seconds, 2 * servers.link)
        ranks = world.num_score_ranks + sum(servers.count for servers in played.servers)
        found = measured(fleet, updates, world.num_replicas, ranks, images)
        return images / (images / found.images_per_second + rest)

    return Compared(images / planned.seconds, simulated(0.0), simulated(0.1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100-80", help="of the job (h100-80)")
    parser.add_argument("--score-gpu", default="l40s", help="of those that join (l40s)")
    parser.add_argument("--updates", type=int, default=10)
    args = parser.parse_args(arguments)
    gpu, model = gpu_named(args.gpu), whole_model(shared_layout(REPLICAS[0]))
    print("| replicas | of the job, joined | planned | simulated | with a spread of 10 % |")
    print("|---|---|---|---|---|")
    for replicas in REPLICAS:
        config = shared_layout(replicas)
        for share in JOINED:
            count = int(share * replicas)
            joined = joined_ranks(f"{count}x{args.score_gpu}") if count else ()
            found = compare(config, gpu, joined, model_shares(config, model), args.updates)
            cells = [
                f"{replicas}",
                f"{replicas // SHARING}, {count}",
                f"{found.planned:,.0f}",
                *(
                    f"{speed:,.0f} ({speed / found.planned:.2f})"
                    for speed in (found.simulated, found.spread)
                ),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
