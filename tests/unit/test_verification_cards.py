"""Figures of CI's steps: `.ci/run FIGURES.json` notes them, `--update` takes those that passed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import verification_page

REPOSITORY = Path(__file__).parents[2]
TOOLS = ("sbatch", "slurmctld", "slurmd", "chromium")


def stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_ci(folder: Path, failing: str = "") -> tuple[int, list[dict]]:
    """Exit code and figures of .ci/run in a repository of `folder` whose steps do nothing."""
    for command in verification_page.ci_commands():
        script = command.split()[1]
        stub(folder / script, "exit 3" if script == failing else "echo '=== 1 passed in 0.1s ==='")
    for tool in TOOLS:
        stub(folder / "bin" / tool, "")
    (folder / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", folder / ".ci" / "run")
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    done = subprocess.run(
        ["bash", ".ci/run", "figures.json"],
        cwd=folder, check=False, env=os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"},
    )  # fmt: skip
    return done.returncode, json.loads((folder / "figures.json").read_text())


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """Another file and page than the repository's."""
    path = tmp_path / "kept" / "verification_ci.json"
    path.parent.mkdir()
    path.write_text("[]\n")
    monkeypatch.setattr(verification_page, "CI_FIGURES", path)
    monkeypatch.setattr(verification_page, "PAGE", path.parent / "verification.md")
    return path


def test_figures_of_ci_reach_the_rows_of_their_steps(tmp_path, kept):
    code, steps = run_ci(tmp_path / "clone")
    assert code == 0
    assert {step["command"] for step in steps} == verification_page.ci_commands()
    steps[0]["seconds"] = 754
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(steps))
    assert verification_page.main(["--update", str(file)]) == 0
    (row,) = [
        line
        for line in verification_page.PAGE.read_text().splitlines()
        if "quickstart, a few updates" in line
    ]
    assert "| 13 min (" in row and row.endswith(
        f"every commit; time: {steps[0]['date']}, {steps[0]['commit']} |"
    )
    # One step alone leaves the others as they were.
    file.write_text(json.dumps([steps[1] | {"seconds": 99}]))
    assert verification_page.main(["--update", str(file)]) == 0
    found = verification_page.ci_figures()
    assert found[steps[0]["command"]] == steps[0]
    assert found[steps[1]["command"]]["seconds"] == 99


def test_what_failed_or_nobody_else_has_is_not_taken(tmp_path, kept, capsys):
    code, steps = run_ci(tmp_path / "clone", failing="tests/oldest_versions.sh")
    assert code == 1
    assert [step["command"] for step in steps if not step["passed"]] == [
        "bash tests/oldest_versions.sh"
    ]
    good = [step for step in steps if step["passed"]]
    file = tmp_path / "figures.json"
    for report, message in (
        (steps, "bash tests/oldest_versions.sh failed"),
        ([good[0] | {"commit": good[0]["commit"] + "-dirty"}], "run it on a clean checkout"),
        ([good[0] | {"commit": ""}], "the commit is not known"),
        ([good[0] | {"command": "make"}], "no row of verification.yaml has make"),
        ([{"command": "make"}], "error: "),
    ):
        file.write_text(json.dumps(report))
        assert verification_page.main(["--update", str(file)]) == 1
        assert message in capsys.readouterr().err
    assert verification_page.main(["--update", str(tmp_path / "none.json")]) == 1
    assert json.loads(kept.read_text()) == [] and not verification_page.PAGE.exists()
