"""The run behind benchmarks/gpu.sh: its parts in processes of their own, within the time, and after
each the JSON and the page as they are by then. Imports no torch."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import OUT_OF_TIME, last_words
from benchmarks.gpu.rows import Row, failed, not_run, row_of
from benchmarks.gpu.worker import PARTS
from megatron_kosmosg.files import write_json, write_text
from megatron_kosmosg.pages import render_page

REPOSITORY = Path(__file__).parents[2]
TESTS_AT_MOST, PART_AT_MOST, WORTH_STARTING = 240, 360, 20
"""Seconds."""
TESTS = "tests"
ALL_PARTS = (TESTS, *PARTS)
COMPARED = ("commit", "sizes", "card", "machine")
"""Facts, beside the doctor's, in which runs have to agree whose rows stand in one table."""
INSTRUCT, DATA_PATH = "instruct, cached latents", "data path, cached latents"
EAGER, COMPILED = "plain loop, eager", "plain loop, torch.compile"
"""Names of rows that are compared; the modules that write them import torch, this one does not."""


class OtherFigures(Exception):
    """The output folder has rows that those of this run cannot stand beside."""


class Run:
    """What is known so far, and the time that is left.

    Without `--parts` the table begins anew; with it, the rows of the other parts stay.
    Raises OtherFigures where they are of another commit, card or version.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._folder = folder
        self._output, self._is_smoke = args.output, args.cpu_smoke
        self._parts = [part for part in ALL_PARTS if part in (args.parts or ALL_PARTS)]
        self._ends = time.monotonic() + 60 * args.minutes
        self._environment = os.environ | {"OMP_NUM_THREADS": "1" if args.cpu_smoke else "8"}
        if args.cpu_smoke:
            self._environment["CUDA_VISIBLE_DEVICES"] = ""
        self.rows: list[Row] = []
        self._facts: dict[str, object] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["bash benchmarks/gpu.sh", *sys.argv[1:]]),
            "commit": _output_of("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
            "sizes": "tiny, on the CPU: figures mean nothing" if args.cpu_smoke else "full",
            "card": _card() if not args.cpu_smoke else "none asked for",
            "machine": f"{os.cpu_count()} CPU cores, {platform.platform()}",
        }
        path = self._output / "gpu.json"
        found = _rows_in(path) if args.parts and path.exists() else None
        for name in COMPARED if found else ():
            self._demand_the_same(name, found, path)
        self._facts["doctor"] = self._doctor()
        if found:
            self._demand_the_same("doctor", found, path)
            self.rows = [row for row in found["rows"] if row.part not in self._parts]
            self._facts["command"] = f"{found['command']}; {self._facts['command']}"

    @property
    def left(self) -> float:
        return self._ends - time.monotonic()

    def _doctor(self) -> list[str]:
        """Versions and kernels."""
        command = (sys.executable, "tools/doctor.py")
        return _output_of(*command, environment=self._environment).splitlines()

    def _demand_the_same(self, name: str, found: dict[str, Any], path: Path) -> None:
        if found.get(name) != self._facts[name]:
            raise OtherFigures(
                f"{path} is of another {name} ({_short(found.get(name))}) than this run "
                f"({_short(self._facts[name])}); give another --output, or leave out --parts "
                "to begin anew"
            )

    def measure_all(self) -> None:
        """The parts of this run, one after the other."""
        self.write()
        if TESTS in self._parts:
            self.test()
            self.write()
        self.measure([part for part in self._parts if part != TESTS])

    def test(self) -> None:
        """One row for every GPU test with all its cases; the numbers of the CPU are what they
        compare with."""
        report = self._folder / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-v", "tests/gpu", f"--junitxml={report}"]
        seconds = min(self.left, TESTS_AT_MOST)
        self._say(TESTS, seconds)
        tail = self._run([*command, "-p", "no:cacheprovider"], seconds)
        if not report.exists():
            is_missing = tail.startswith(OUT_OF_TIME) or "No module named" in tail
            state = not_run if is_missing else failed
            self.rows.append(replace(state("GPU tests", "all of them", tail), part=TESTS))
            return
        cases: dict[str, list[ElementTree.Element]] = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            cases.setdefault((case.get("name") or "").partition("[")[0], []).append(case)
        self.rows += [replace(_test_row(*case), part=TESTS) for case in cases.items()]
        if tail.startswith(OUT_OF_TIME):
            row = not_run("GPU tests", "the rest of them", tail)
            self.rows.append(replace(row, part=TESTS))

    def measure(self, parts: list[str]) -> None:
        """At tiny size all in one process, whose imports are most of the work."""
        groups = [parts] if self._is_smoke and parts else [[part] for part in parts]
        for group in groups:
            if self.left < WORTH_STARTING:
                for part in group:
                    row = not_run(part, "all of it", "no time was left")
                    self.rows.append(replace(row, part=part))
                self.write()
                continue
            written = self._folder / "rows.jsonl"
            written.write_text("")
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.worker"]
            command += ["--sizes", "smoke" if self._is_smoke else "full"]
            command += ["--folder", str(self._folder), "--rows", str(written), *group]
            seconds = min(self.left, PART_AT_MOST)
            self._say(", ".join(group), seconds)
            tail = self._run(command, seconds)
            self.rows += [row_of(line) for line in written.read_text().splitlines()]
            if tail:
                state = not_run if tail.startswith(OUT_OF_TIME) else failed
                row = state(", ".join(group), "the rest of it", tail)
                self.rows.append(replace(row, part=group[-1]))
            self.write()

    def compare(self) -> None:
        """Our best `instruct` on cached latents against the loop, with its compiler and without."""
        self.rows = [row for row in self.rows if row.section != "comparison"]
        values = {row.name: row.value for row in self.rows if row.state == "measured"}
        instruct = max(
            (v for name, v in values.items() if name.startswith(INSTRUCT) and v), default=None
        )
        eager, compiled = values.get(EAGER), values.get(COMPILED)
        cases = (
            ("ours / the plain loop with its torch.compile", instruct, compiled, 2),
            ("ours / the plain loop without it", instruct, eager, 2),
            ("data path / what the step takes", values.get(DATA_PATH), instruct, 3),
        )
        for name, one, other, target in cases:
            if one and other:
                row = Row("comparison", name, value=one / other, unit="x", target=target)
                self.rows.append(row)
            else:
                self.rows.append(not_run("comparison", name, "one of the two has no figure"))

    def write(self) -> None:
        """gpu.json and gpu.html, whole."""
        self.compare()
        rows = [asdict(row) for row in self.rows]
        write_json(self._output / "gpu.json", self._facts | {"rows": rows})
        page = render_page(Path(__file__).with_name("page.html"), facts=self._facts, rows=self.rows)
        write_text(self._output / "gpu.html", page)

    def _run(self, command: list[str], seconds: float) -> str:
        output = self._folder / "output"
        return last_words(command, seconds, output, cwd=REPOSITORY, env=self._environment)

    def _say(self, part: str, seconds: float) -> None:
        known = len(self.rows)
        left = f"{self.left / 60:.1f} minutes left"
        print(f"{part}: at most {seconds:.0f} s; {known} rows so far, {left}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--cpu-smoke", action="store_true")
    parser.add_argument("--parts", type=_parts, default=())
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "gpu")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g} is no time; give a number above 0")
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Run(args, Path(folder))
        except OtherFigures as error:
            parser.error(str(error))
        run.measure_all()
    counts = {state: sum(row.state == state for row in run.rows) for state in _STATES}
    print(", ".join(f"{count} rows {state}" for state, count in counts.items()))
    print(args.output / "gpu.json")
    print(args.output / "gpu.html")
    return 1 if counts["failed"] else 0


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = [part for part in parts if part not in ALL_PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(map(repr, unknown))}: no such part; there are {', '.join(ALL_PARTS)}"
        )
    return parts


def _rows_in(path: Path) -> dict[str, Any]:
    """A table as it was written, its rows as Row."""
    try:
        found = json.loads(path.read_text())
        return found | {"rows": [row_of(json.dumps(row)) for row in found["rows"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise OtherFigures(
            f"{path} is not what this version writes ({error}); give another --output"
        ) from error


def _short(value: object) -> str:
    return text if len(text := str(value)) < 200 else text[:200] + " ..."


def _test_row(name: str, cases: list[ElementTree.Element]) -> Row:
    problems = [f"{c.get('name')}: {p.get('message')}" for c in cases for p in c if p.tag in _BAD]
    if problems:
        return failed("GPU tests", name, f"{len(problems)} of {len(cases)}: {problems[0]}")
    skipped = [found for found in (case.find("skipped") for case in cases) if found is not None]
    if len(skipped) == len(cases):
        return not_run("GPU tests", name, skipped[0].get("message") or "skipped")
    details: dict[str, float | int | str] = {}
    if skipped:
        details = {"not run": len(skipped), "because": skipped[0].get("message") or ""}
    passed = len(cases) - len(skipped)
    return Row("GPU tests", name, value=passed, unit="cases passed", details=details)


_BAD = ("failure", "error")
_STATES = ("measured", "not run", "failed")


def _card() -> str:
    query = "name,memory.total,driver_version,clocks.max.sm,power.limit"
    return _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or "none found"


def _output_of(*command: str, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
