"""`tests/run.sh --full` and its counts: what passed is left out by a later call, what failed is not
forgotten, and another state of the checkout begins anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TESTS = """
import os, signal
from pathlib import Path
import pytest

def test_first(): pass
def test_skipped(): pytest.skip("not here")
def test_second():
    if Path("kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    assert not Path("fail").exists()
def test_third(): pass
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / ".gitignore").write_text(".pytest_cache\n__pycache__\nkill\nfail\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    return tmp_path


def run(checkout: Path, count: int = 1, *arguments: str) -> tuple[int, str]:
    """(exit code, what pytest said)."""
    plugin = ["-p", "tests.support.counted_tests", "--count", str(count)]
    command = [sys.executable, "-m", "pytest", *plugin, *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_later_call_goes_on_where_a_killed_one_stopped(checkout):
    (checkout / "kill").touch()
    code, _ = run(checkout)
    assert code == -9
    (checkout / "kill").unlink()
    code, said = run(checkout)
    assert code == 0 and "2 passed, 1 skipped, 1 deselected" in said
    assert "1 passed in earlier calls, 3 left" in said
    assert "3 tests have passed, 0 s of them; no failure on the way" in said
    code, said = run(checkout, 1, "--deselect", "test_it.py::test_skipped")
    assert code == 0 and "4 deselected" in said, "nothing is left"
    code, said = run(checkout, 2, "-n", "2")
    assert code == 0 and "3 passed, 1 skipped" in said and "4 left, about" in said
    code, said = run(checkout, 2, "-n", "2")
    assert code == 0 and "= 1 skipped in" in said


def test_a_failure_is_run_again_and_stays_named_and_another_state_begins_anew(checkout):
    (checkout / "fail").touch()
    assert run(checkout)[0] == 1
    (checkout / "fail").unlink()
    code, said = run(checkout)
    assert code == 0 and "1 passed, 1 skipped, 2 deselected" in said
    assert "failed on the way: test_it.py::test_second" in said
    (checkout / "new.py").write_text("")
    code, said = run(checkout)
    assert code == 0 and "3 passed, 1 skipped" in said and "no failure on the way" in said


def test_without_a_checkout_it_is_one_message(tmp_path):
    (tmp_path / "test_it.py").write_text("def test(): pass\n")
    code, said = run(tmp_path)
    assert code == pytest.ExitCode.USAGE_ERROR and "--count needs a git checkout" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--full", "--count", "0"], "--count needs a number from 1, not '0'"),
        (["--full", "--count"], "--count needs a number from 1, not ''"),
        (["--count", "2"], "--count is for --full; add --full"),
    ],
)
def test_wrong_counts_are_one_message(arguments, words):
    command = ["bash", str(REPOSITORY / "tests" / "run.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {words}\n")
