"""How fast ranks add up a tensor, inside each node and across all: finds slow nodes early."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from megatron_kosmosg.parallel.devices import has_stream

MEBIBYTES_ON_GPU, MEBIBYTES_ON_CPU = 128, 4
WARM_UP, REPEATS = 2, 4


@dataclass(frozen=True)
class Bandwidth:
    inside: dict[str, float]
    """GB/s (bus bandwidth of an all-reduce) among the ranks of each node that has several."""
    across: float | None
    """GB/s among all ranks; None if there is one."""


def measure_bandwidth(node: str, device: torch.device) -> Bandwidth:
    """Measures, as a collective over torch.distributed's world, and returns the same on every rank.
    `node` is this rank's."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, node)
    groups = {  # every rank takes part in making every group
        name: dist.new_group([rank for rank, other in enumerate(names) if other == name])
        for name in sorted(set(names))
    }
    local_speed, size = 0.0, names.count(node)
    if size > 1:
        local_group = cast(dist.ProcessGroup, groups[node])  # a number where this rank is outside
        local_speed = _all_reduce_speed(local_group, size, device)
    speeds: list[float] = [0.0] * len(names)
    dist.all_gather_object(speeds, local_speed)
    slowest = {
        name: min(s for n, s in zip(names, speeds, strict=True) if n == name) for name in names
    }
    across = _all_reduce_speed(dist.group.WORLD, len(names), device) if len(names) > 1 else None
    return Bandwidth({name: speed for name, speed in slowest.items() if speed}, across)


def slow_nodes(inside: dict[str, float], share: float) -> dict[str, float]:
    """Nodes slower than `share` of the median, with their speed as a share of it."""
    if not inside:
        return {}
    median = sorted(inside.values())[len(inside) // 2]
    return {name: speed / median for name, speed in inside.items() if speed < share * median}


def _all_reduce_speed(group: dist.ProcessGroup | None, size: int, device: torch.device) -> float:
    mebibytes = MEBIBYTES_ON_GPU if has_stream(device) else MEBIBYTES_ON_CPU
    tensor = torch.ones(mebibytes * 2**18, device=device)
    for _ in range(WARM_UP):
        dist.all_reduce(tensor, group=group)
    tensor[:1].item()
    started = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(tensor, group=group)
    tensor[:1].item()  # waits for the device
    seconds = (time.perf_counter() - started) / REPEATS
    return 2 * (size - 1) / size * 4 * tensor.numel() / seconds / 1e9
