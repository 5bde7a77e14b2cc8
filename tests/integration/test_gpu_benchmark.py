"""benchmarks/gpu.sh at tiny size on the CPU: every section runs, what is missing has a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
GPU_ALONE = {
    "frozen U-Net, forward and condition's gradient, CUDA graph",
    "decoder, rows of 32 text tokens, MFU",
}
MEASURED = {
    "U-Net": 2,
    "steps": 5,
    "plain loop": 2,
    "data": 5,
    "comparison": 3,
}
"""{section: how many figures it has on any machine}; DALI's and those of compiled steps come on
top."""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *words],
        cwd=REPOSITORY,
        env=os.environ | {"VIRTUAL_ENV": sys.prefix} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    done = run("--cpu-smoke", "--output", str(folder))
    assert done.returncode == 0, done.stdout + (folder / "gpu.json").read_text()
    return folder


def test_every_section_has_its_figures_and_every_gap_a_reason(output):
    found = json.loads((output / "gpu.json").read_text())
    assert found["command"].startswith("bash benchmarks/gpu.sh --cpu-smoke") and found["date"]
    assert any(line.startswith("torch ") for line in found["doctor"])
    rows = found["rows"]
    for section, least in MEASURED.items():
        values = [r["value"] for r in rows if (r["section"], r["state"]) == (section, "measured")]
        assert len(values) >= least and all(value >= 0 for value in values), section
    missing = {row["name"]: row["reason"] for row in rows if row["state"] == "not run"}
    assert missing.keys() >= GPU_ALONE and all(missing.values())
    tests = [row for row in rows if row["section"] == "GPU tests"]
    assert len(tests) >= 4 and all("CUDA device" in row["reason"] for row in tests)


def test_the_page_has_every_row(output):
    page = (output / "gpu.html").read_text()
    for row in json.loads((output / "gpu.json").read_text())["rows"]:
        assert row["name"].replace("'", "&#39;") in page


def test_a_library_that_is_missing_is_a_row(tmp_path):
    """In the worker, which alone imports it."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("raise ImportError('no diffusers here')")
    rows = tmp_path / "rows"
    command = ["--sizes", "smoke", "--folder", str(tmp_path), "--rows", str(rows), "U-Net"]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.worker", *command],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        check=True,
    )
    (row,) = map(json.loads, rows.read_text().splitlines())
    assert row["state"] == "not run" and "no diffusers here" in row["reason"]


def test_no_time_is_refused(tmp_path):
    done = run("--minutes", "0", "--output", str(tmp_path))
    assert done.returncode == 2 and "--minutes 0" in done.stderr
