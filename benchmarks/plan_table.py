"""The table of docs/plans.md: the fastest planned layout of `instruct` on N GPUs of every kind.

usage: python -m benchmarks.plan_table [N ...] > table.md

Takes about ten CPU-minutes for all of it: nine kinds of GPU, ten numbers of them.
"""

from __future__ import annotations

import sys

import torch

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.comparison import in_words
from megatron_kosmosg.planning.gpus import GPUS, Efficiency, Gpu
from megatron_kosmosg.planning.model_counts import whole_model
from megatron_kosmosg.planning.other_batches import more_gpus, other_batches
from megatron_kosmosg.planning.plan import planned_config
from megatron_kosmosg.planning.search import Candidate, NothingFits, search

NUMBERS = (1, 2, 4, 6, 8, 24, 64, 100, 256, 512)
HEAD = "| GPUs | images/s | at 1,024 images an update | instead |\n|---|---|---|---|"


def row(num_gpus: int, gpu: Gpu, config: RunConfig, model: torch.nn.Module) -> str:
    """One line. config: instruct_256gpu; model: its `whole_model`."""
    config, _ = planned_config(config, num_gpus, gpu)
    others = other_batches(config, num_gpus, gpu, Efficiency(), model)
    try:
        best = search(config, num_gpus, gpu, Efficiency(), model).candidates[0]
        speed, layout = f"{best.samples_per_second:,.0f}", in_words(best)
    except NothingFits:
        best, speed, layout = None, "", "nothing divides" if others else "nothing fits"
    instead = _faster(best, others)
    if best is None and not others:
        instead = more_gpus(config, num_gpus, gpu, Efficiency(), model)
    cells = [f"{num_gpus} x {gpu.name}", speed, layout, instead]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _faster(best: Candidate | None, others: list[Candidate]) -> str:
    speed = best.samples_per_second if best else 0.0
    return "; ".join(
        f"{other.samples_per_second:,.0f} at {other.config.training.global_batch_size:,}"
        for other in others
        if other.samples_per_second > 1.1 * speed
    )


def main() -> None:
    """Prints the table, or its rows for the numbers given."""
    config = load_config("instruct_256gpu", [])
    model = whole_model(config)
    print(HEAD)
    for num_gpus in map(int, sys.argv[1:]) if sys.argv[1:] else NUMBERS:
        for gpu in GPUS.values():
            print(row(num_gpus, gpu, config, model), flush=True)


if __name__ == "__main__":
    main()
