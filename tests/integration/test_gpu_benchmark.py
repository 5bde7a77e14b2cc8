"""benchmarks/gpu.sh at tiny size on the CPU: every section runs, what is missing has a reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import steps
from benchmarks.gpu.processes import OUT_OF_TIME, last_words
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sizes import SMOKE
from megatron_kosmosg.models import same_result

REPOSITORY = Path(__file__).parents[2]
GPU_ALONE = {
    "frozen U-Net, forward and condition's gradient, CUDA graph",
    "decoder, rows of 32 text tokens, MFU",
    *(
        f"frozen U-Net, forward and condition's gradient, attention by {name}"
        for name in ("cudnn", "flash", "efficient")
    ),
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
    command = ["--sizes", "smoke", "--folder", str(tmp_path), "--rows", str(rows), "unet"]
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


def test_one_part_alone_keeps_the_rows_of_the_others(output, tmp_path):
    folder = tmp_path / "figures"
    shutil.copytree(output, folder)
    before = json.loads((folder / "gpu.json").read_text())
    known = [row for row in before["rows"] if row["part"] not in ("", "unet")]
    done = run("--cpu-smoke", "--parts", "unet", "--output", str(folder))
    assert done.returncode == 0 and done.stdout.startswith("unet: at most"), done.stderr
    after = json.loads((folder / "gpu.json").read_text())
    assert [row for row in after["rows"] if row["part"] not in ("", "unet")] == known
    of_both = [
        [row for row in found["rows"] if row["part"] == "unet" and row["state"] == "measured"]
        for found in (before, after)
    ]
    names = [[row["name"] for row in rows] for rows in of_both]
    assert names[0] == names[1] and of_both[0] != of_both[1]
    assert len(after["rows"]) == len(before["rows"])
    assert "--cpu-smoke --output" in after["command"] and "--parts unet" in after["command"]


@pytest.mark.parametrize("fact", ["commit", "doctor"])
def test_rows_of_another_state_are_not_mixed(output, tmp_path, fact):
    found = json.loads((output / "gpu.json").read_text())
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(found | {fact: "another"}))
    done = run("--cpu-smoke", "--parts", "unet", "--output", str(tmp_path))
    assert done.returncode == 2 and f"of another {fact} (another)" in done.stderr
    assert json.loads(path.read_text())[fact] == "another"


def test_a_file_that_is_no_table_is_not_overwritten(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"rows": [1]}')
    done = run("--cpu-smoke", "--parts", "unet", "--output", str(tmp_path))
    assert done.returncode == 2 and "not what this version writes" in done.stderr
    assert path.read_text() == '{"rows": [1]}'


def test_a_part_that_is_not_known_is_refused(tmp_path):
    done = run("--parts", "unet,dali", "--output", str(tmp_path))
    assert done.returncode == 2 and "'dali': no such part; there are tests, unet" in done.stderr


INTERRUPTED = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        if sys.argv[1] == "ends":
            sys.exit(3)
"""


@pytest.fixture(params=["in front", "in the background"])
def place(request) -> Iterator[None]:
    """A shell's background has SIGINT ignored, in all that it starts."""
    before = signal.getsignal(signal.SIGINT)
    is_heard = request.param == "in front"
    signal.signal(signal.SIGINT, signal.default_int_handler if is_heard else signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("what", ["ends", "goes on"])
def test_what_takes_too_long_is_interrupted_then_killed_with_its_children(tmp_path, what):
    started = time.monotonic()
    command = [sys.executable, "-c", INTERRUPTED, what]
    log = tmp_path / "log"
    words = last_words(command, 2, log, cwd=tmp_path, env=dict(os.environ), to_write=1)
    assert words.startswith(f"{OUT_OF_TIME} 2 s: ") and words.endswith("interrupted")
    child = Path("/proc") / log.read_text().split()[0] / "cmdline"
    until = time.monotonic() + 10
    while child.exists() and child.read_bytes() and time.monotonic() < until:
        time.sleep(0.05)
    assert not (child.exists() and child.read_bytes())
    assert time.monotonic() - started < 30


def test_what_ends_well_says_nothing(tmp_path):
    arguments = {"log": tmp_path / "log", "cwd": tmp_path, "env": dict(os.environ)}
    assert last_words(["true"], 10, **arguments) == ""
    assert last_words(["sh", "-c", "echo no; exit 4"], 10, **arguments) == "no"
    assert last_words(["sh", "-c", "exit 4"], 10, **arguments) == "code 4"


def test_a_step_whose_faster_passes_were_left_aside_has_no_figure(tmp_path, monkeypatch):
    def measured(sizes, which, name, config, *_):
        if config.performance.compile == "cudagraph":
            same_result.logger.warning("%s stays as it is, out of memory", "the U-Net")
        yield Row("steps", name, value=1.0, details={"batch": 2})

    monkeypatch.setattr(steps, "_measured", measured)
    rows = [*steps.instruct_rows(SMOKE, tmp_path, torch.device("cuda", 0))]
    assert [row.state for row in rows] == ["measured", "measured", "measured", "failed"]
    assert "the U-Net stays as it is, out of memory" in rows[-1].reason
