"""`--count N`: a run of tests that may be interrupted, and goes on where it stopped.

A plugin of pytest (`-p tests.support.counted_tests`, as `tests/run.sh --full` gives it). Tests that
have passed are kept by count and by the state of the checkout, in pytest's own cache; a later call
with the same number leaves them out. Those that failed are run again and stay named: a count is
clean where nothing failed on its way.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

SECONDS_BETWEEN_LINES = 30.0
_WORKER_INPUT = "passed in this count"


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "leave out what has passed in earlier calls with this number, on the same checkout"
    parser.addoption("--count", type=int, metavar="N", help=text)


def pytest_configure(config: pytest.Config) -> None:
    number = config.getoption("--count")
    if number is None:
        return
    given = getattr(config, "workerinput", None)
    if given is not None:
        config.pluginmanager.register(PassedBefore(given[_WORKER_INPUT]))
        return
    assert config.cache is not None
    folder = config.cache.mkdir("counts")
    try:
        state = checkout_state(config.rootpath)
    except (OSError, subprocess.CalledProcessError) as error:
        raise pytest.UsageError(f"--count needs a git checkout: {error}") from error
    ledger = Ledger(folder / f"{state}-{number}.jsonl")
    config.pluginmanager.register(PassedBefore(ledger.passed))
    config.pluginmanager.register(Count(config, f"count {number} of {state}", ledger))


def checkout_state(folder: Path) -> str:
    """The commit, and a digest of what differs from it where anything does.

    Raises OSError, subprocess.CalledProcessError.
    """

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True).stdout

    commit = git("rev-parse", "--short=12", "HEAD").decode().strip()
    digest, changes = hashlib.sha256(), git("diff", "--binary", "HEAD")
    added = git("ls-files", "--others", "--exclude-standard", "-z").decode().split("\0")[:-1]
    if not changes and not added:
        return commit
    digest.update(changes)
    for name in added:
        path = folder / name
        digest.update(name.encode() + (path.read_bytes() if path.is_file() else b""))
    return f"{commit}-{digest.hexdigest()[:8]}"


class Ledger:
    """What one count has done so far: a line of JSON for each test, in the order of their ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.passed: dict[str, float] = {}
        """Seconds of each test that passed, by its id."""
        self.failed: list[str] = []
        """Every failure, a test that failed twice twice."""
        for line in _lines(path):
            self._take(line)

    def add(self, test: str, passed: bool, seconds: float) -> None:
        line = {"test": test, "passed": passed, "seconds": round(seconds, 2)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if line["passed"]:
            self.passed[line["test"]] = line["seconds"]
        else:
            self.failed.append(line["test"])

    def seconds_elsewhere(self) -> dict[str, float]:
        """How long tests took in any count of any commit on this machine."""
        found: dict[str, float] = {}
        for path in sorted(self._path.parent.glob("*.jsonl")):
            found |= {line["test"]: line["seconds"] for line in _lines(path) if line["passed"]}
        return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole: a killed process may leave half a line."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


class PassedBefore:
    """Leaves tests out, here or in a worker of pytest-xdist."""

    def __init__(self, passed: Iterable[str]) -> None:
        self._passed = frozenset(passed)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]):
        left_out = [item for item in items if item.nodeid in self._passed]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in self._passed]


class Count:
    """Writes the ledger, and says how far the count is."""

    def __init__(self, config: pytest.Config, name: str, ledger: Ledger) -> None:
        self._config, self._name, self._ledger = config, name, ledger
        self._before = len(ledger.passed)
        self._expected = ledger.seconds_elsewhere()
        self._left: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._is_bad: dict[str, bool] = {}
        self._has_passed: set[str] = set()
        self._started = self._said = time.monotonic()
        self._done = 0

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[_WORKER_INPUT] = sorted(self._ledger.passed)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._begin(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._begin([item.nodeid for item in session.items])

    def _begin(self, ids: list[str]) -> None:
        """Every worker collects the same tests."""
        if ids and not self._left and not self._done:
            self._left = set(ids)
            self._say(f"{self._before} passed in earlier calls, {self._ahead()}")

    def _ahead(self) -> str:
        """How many tests are left, and for how long where that can be told."""
        known = [self._expected[test] for test in self._left if test in self._expected]
        words = f"{len(self._left)} left"
        if self._left and 2 * len(known) >= len(self._left):
            one_by_one = sum(known) / len(known) * len(self._left)
            words += f", about {_duration(one_by_one / self._at_once())}"
        return words

    def _at_once(self) -> float:
        """Tests that run side by side: as the first ones did, before that those of -n."""
        elapsed, worked = time.monotonic() - self._started, sum(self._seconds.values())
        if self._done >= 20:
            return max(1.0, worked / elapsed)
        given = getattr(self._config.option, "numprocesses", None)
        return given if isinstance(given, int) and given > 1 else 1.0

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        self._seconds[test] = self._seconds.get(test, 0.0) + report.duration
        self._is_bad[test] = self._is_bad.get(test, False) or report.failed
        if report.when == "call" and report.passed:
            self._has_passed.add(test)
        if report.when != "teardown":
            return
        self._done += 1
        self._left.discard(test)
        # A test that was skipped has not passed, and is asked for again.
        if self._is_bad[test] or test in self._has_passed:
            self._ledger.add(test, not self._is_bad[test], self._seconds[test])
            self._expected[test] = self._seconds[test]
        if self._left and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._say(self._ahead())

    def _say(self, words: str) -> None:
        self._said = time.monotonic()
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"{self._name}: {words}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._before:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self) -> None:
        passed, failed = self._ledger.passed, self._ledger.failed
        words = f"{len(passed)} tests have passed, {_duration(sum(passed.values()))} of them"
        if self._left:
            words += f"; {len(self._left)} left, the same command goes on"
        self._say(words if failed else f"{words}; no failure on the way")
        for test in dict.fromkeys(failed):
            self._say(f"failed on the way: {test}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
