"""The table of docs/plans.md is what the planner says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.plan_table import HEAD, NUMBERS, row
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.planning.gpus import GPUS
from megatron_kosmosg.planning.model_counts import whole_model

PLANS = Path(__file__).parents[2] / "docs" / "plans.md"


@pytest.fixture(scope="module")
def full_size():
    config = load_config("instruct_256gpu", [])
    return config, whole_model(config)


@pytest.mark.parametrize(("num_gpus", "gpu"), [(1, "h100-80"), (2, "rtx4090-24")])
def test_the_table_of_the_docs_is_what_is_planned(full_size, num_gpus, gpu):
    assert row(num_gpus, GPUS[gpu], *full_size) in PLANS.read_text().splitlines()


def test_the_table_has_every_number_of_every_gpu():
    lines = PLANS.read_text()
    assert HEAD in lines
    for num_gpus in NUMBERS:
        for gpu in GPUS:
            (cells,) = re.findall(rf"^\| {num_gpus} x {gpu} \| (.*) \|$", lines, re.MULTILINE)
            speed, _, instead = (cell.strip() for cell in re.split(r"(?<!\\)\|", cells))
            assert speed or instead, f"{num_gpus} x {gpu} says nothing to act on"
