"""The table of docs/scaling.md says what a rehearsal counts today.

Two of its rows: a score rank is rehearsed at full size for another test anyway, and of the shipped
configs `align_256gpu` takes the shortest. `python -m benchmarks.rehearsal_table` makes all anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rehearsal_table import HEAD, NAMES, rows
from tests.support.rehearsals import Rehearsals

SCALING = Path(__file__).parents[2] / "docs" / "scaling.md"
KERNELS = 2
"""By so many the counts of two versions of megatron-core differ."""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def documented() -> dict[str, list[str]]:
    """{config and kind of rank: the other cells of the row}."""
    _, _, table = SCALING.read_text().partition(HEAD)
    assert table, "the table has other columns than benchmarks.rehearsal_table prints"
    lines = table.strip().partition("\n\n")[0].splitlines()
    return {name: others for name, *others in map(cells, lines)}


def rehearsed_score(rehearse: Rehearsals) -> dict:
    """A case of `test_memory_plan.py`, which has four replicas: a score rank does not see how
    many there are."""
    case = rehearse.score_rank()
    kind = {"name": "score", "rehearsed": rehearse.answer(case), "planned": rehearse.planned(case)}
    return {"kinds": [kind]}


def rehearsed_align(rehearse: Rehearsals) -> dict:
    return rehearse.shipped("align_256gpu", num_gpus=256, with_tiny_models=False)


@pytest.mark.parametrize(
    ("name", "report"), [("instruct_256gpu", rehearsed_score), ("align_256gpu", rehearsed_align)]
)
def test_a_row_is_what_is_rehearsed_today(rehearse, name, report):
    (line,) = rows(name, report(rehearse))
    label, *found = cells(line)
    expected = documented()[label]
    advice = f"python -m benchmarks.rehearsal_table prints {found}, the document has {expected}"
    for kernels, written in zip(found[:2], expected[:2], strict=True):
        assert bool(kernels) == bool(written), advice
        if kernels:
            assert abs(number(kernels) - number(written)) <= KERNELS, advice
    assert found[2:] == expected[2:], advice


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_every_large_shipped_config_has_a_row():
    labels = [label.partition(",")[0] for label in documented()]
    assert list(dict.fromkeys(labels)) == list(NAMES)
