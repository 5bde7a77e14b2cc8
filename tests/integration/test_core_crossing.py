"""A run that was trained on an older Megatron-Core goes on on a newer, and back, to equal losses.

One is this Python's, the other that of the Python in KOSMOSG_OTHER_PYTHON, which has this package's
needs in other versions (tests/second_environment.sh makes such an environment and sets it). Dropout
is on, so the random state has to cross too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.core_crossing import STAGES
from tests.support.digests import iterations

REPOSITORY = Path(__file__).parents[2]
OTHER = os.environ.get("KOSMOSG_OTHER_PYTHON")
STARTED, CROSSED, RETURNED = 10, 13, 16
"""Iterations at which the runs are handed over; those before the fourth are the archives' own."""
LOSS = 1e-5
"""Relative, of losses and gradient norms in fp32. Both give the same digits on one machine as a
rule; instruction sets move them by less than 1e-6, other dropout masks by more than 3e-5."""


def go_on(python: str, work: Path, to: int) -> None:
    """Takes all runs in `work` to iteration `to`."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-W", "ignore", "-m", "tests.support.core_crossing", work, str(to)],
        cwd=REPOSITORY,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "another parallel layout" not in done.stderr


def core_of(python: str) -> list[int]:
    """The release that a Python has."""
    program = "import importlib.metadata as m; print(m.version('megatron-core'))"
    told = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return [int(number) for number in told.stdout.strip().split(".")]


def test_a_run_goes_on_on_another_core_and_back(past, tmp_path):
    if OTHER is None:
        pytest.skip("not run: no second environment (KOSMOSG_OTHER_PYTHON is not set)")
    older, newer = sorted((sys.executable, OTHER), key=core_of)
    assert core_of(older) < core_of(newer), "both have the same megatron-core"
    # One folder for both: a run knows its files by their whole paths.
    work, started, stayed = tmp_path / "work", tmp_path / "started", tmp_path / "stayed"
    shutil.copytree(past, work)
    go_on(older, work, STARTED)
    shutil.copytree(work, started)
    go_on(older, work, RETURNED)
    work.rename(stayed)
    started.rename(work)
    go_on(newer, work, CROSSED)
    go_on(older, work, RETURNED)
    for stage in STAGES:
        expected, found = (iterations(folder / "runs" / stage) for folder in (stayed, work))
        assert [line["iteration"] for line in found] == list(range(1, RETURNED + 1))
        for key in ("loss", "grad_norm"):
            crossing, staying = ([line[key] for line in lines] for lines in (found, expected))
            assert crossing == pytest.approx(staying, rel=LOSS), (stage, key)
