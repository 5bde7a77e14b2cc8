"""When each rank of a replica works in one update: Megatron's 1F1B order, played through.

A dedicated score rank takes whole micro-batches, round robin, in the order of micro-batch and
replica; the decoder runs `ahead` more forward passes before it waits for the first answer. The
order of passes is that of score/schedule.py; what is sent waits for its receiver, the
sender goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timeline:
    """One update as it passes in time, without the exchange of gradients and the optimizer."""

    seconds: float
    decoder_busy: float
    """Seconds that a decoder rank works, mean over the pipeline stages."""
    score_busy: float
    """Seconds that a dedicated score rank works, mean over them; 0 without."""


def play(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    score: Sequence[float] | None = None,
    *,
    score_ranks: int = 1,
    replicas: int = 1,
    ahead: int = 0,
    link: float = 0.0,
) -> Timeline:
    """Seconds of the whole. forward, backward: [pipeline stage][micro-batch] seconds.

    Args:
        score: seconds of each micro-batch on a dedicated score rank; None where it is colocated.
        replicas: number of those that share the score ranks.
        ahead: extra warm-up forwards of every pipeline stage.
        link: seconds that a condition takes to a score rank, and its answer back.
    """
    num_pipeline_stages, count = len(forward), len(forward[0])
    orders = [
        pass_order(num_pipeline_stages, pipeline_stage, count, ahead)
        for pipeline_stage in range(num_pipeline_stages)
    ]
    # By pass, replica, pipeline stage and micro-batch.
    done: dict[tuple[str, int, int, int], float] = {}
    free = {
        (replica, pipeline_stage): 0.0
        for replica in range(replicas)
        for pipeline_stage in range(num_pipeline_stages)
    }
    pointers = dict.fromkeys(free, 0)
    servers = [0.0] * score_ranks
    queue = [(i, replica) for i in range(count) for replica in range(replicas)]
    waiting: list[list[tuple[int, int]]] = []
    scoring: Sequence[float] = ()
    if score is not None:
        scoring = score
        waiting = [[e for e in queue if e[0] % score_ranks == s] for s in range(score_ranks)]
    left = len(free) * 2 * count
    while left:
        for (replica, pipeline_stage), pointer in pointers.items():
            while pointer < 2 * count:
                name, i = orders[pipeline_stage][pointer]
                ready = _ready(
                    done, name, replica, pipeline_stage, i, num_pipeline_stages, score is not None
                )
                if ready is None:
                    break
                seconds = (forward if name == "F" else backward)[pipeline_stage][i]
                end = max(free[replica, pipeline_stage], ready) + seconds
                free[replica, pipeline_stage] = done[name, replica, pipeline_stage, i] = end
                pointer, left = pointer + 1, left - 1
            pointers[replica, pipeline_stage] = pointer
        for server, entries in enumerate(waiting):
            while entries and ("F", entries[0][1], num_pipeline_stages - 1, entries[0][0]) in done:
                i, replica = entries.pop(0)
                arrived = done["F", replica, num_pipeline_stages - 1, i] + link
                servers[server] = max(servers[server], arrived) + scoring[i]
                done["S", replica, num_pipeline_stages - 1, i] = servers[server] + link
    busy = sum(map(sum, forward)) + sum(map(sum, backward))
    scored = sum(score) * replicas / score_ranks if score is not None else 0.0
    return Timeline(max(free.values()), busy / num_pipeline_stages, scored)


def pass_order(
    num_pipeline_stages: int, pipeline_stage: int, count: int, ahead: int
) -> list[tuple[str, int]]:
    """Forward ("F") and backward ("B") passes of one pipeline stage, with micro-batch numbers."""
    warm_up = min(num_pipeline_stages - pipeline_stage - 1 + ahead, count)
    order = [("F", i) for i in range(warm_up)]
    for i in range(count):
        if warm_up + i < count:
            order.append(("F", warm_up + i))
        order.append(("B", i))
    return order


def _ready(
    done: dict[tuple[str, int, int, int], float],
    name: str,
    replica: int,
    pipeline_stage: int,
    i: int,
    num_pipeline_stages: int,
    dedicated: bool,
) -> float | None:
    """The time when the inputs of a pass are there; None while that is unknown."""
    if name == "F":
        return 0.0 if pipeline_stage == 0 else done.get(("F", replica, pipeline_stage - 1, i))
    if pipeline_stage < num_pipeline_stages - 1:
        return done.get(("B", replica, pipeline_stage + 1, i))
    return done.get(("S" if dedicated else "F", replica, pipeline_stage, i))
