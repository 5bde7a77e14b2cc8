"""The run behind benchmarks/gpu.sh: tests and sections in processes of their own, within the time,
and after each the JSON and the page as they are by then. Imports no torch."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.rows import Row, failed, not_run, row_of
from benchmarks.gpu.worker import SECTIONS
from megatron_kosmosg.files import write_json, write_text
from megatron_kosmosg.pages import render_page

REPOSITORY = Path(__file__).parents[2]
TESTS_AT_MOST, SECTION_AT_MOST, WORTH_STARTING = 240, 360, 20
"""Seconds."""
OUT_OF_TIME = "ended after"
INSTRUCT, DATA_PATH = "instruct, cached latents", "data path, cached latents"
EAGER, COMPILED = "plain loop, eager", "plain loop, torch.compile"
"""Names of rows that are compared; the modules that write them import torch, this one does not."""


class Run:
    """What is known so far, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._output, self._is_smoke = args.output, args.cpu_smoke
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

    @property
    def left(self) -> float:
        return self._ends - time.monotonic()

    def record_doctor(self) -> None:
        """Versions and kernels."""
        lines = _output_of(sys.executable, "tools/doctor.py", environment=self._environment)
        self._facts["doctor"] = lines.splitlines()

    def test(self, folder: Path) -> None:
        """One row for every GPU test with all its cases; the numbers of the CPU are what they
        compare with."""
        report = folder / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--junitxml={report}"]
        seconds = min(self.left, TESTS_AT_MOST)
        tail = self._run([*command, "-p", "no:cacheprovider"], seconds)
        if not report.exists():
            is_missing = tail.startswith(OUT_OF_TIME) or "No module named" in tail
            state = not_run if is_missing else failed
            self.rows.append(state("GPU tests", "all of them", tail))
            return
        cases: dict[str, list[ElementTree.Element]] = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            cases.setdefault((case.get("name") or "").partition("[")[0], []).append(case)
        self.rows += [_test_row(name, found) for name, found in cases.items()]

    def measure(self, folder: Path) -> None:
        """All sections; at tiny size in one process, whose imports are most of the work."""
        groups = [list(SECTIONS)] if self._is_smoke else [[section] for section in SECTIONS]
        for sections in groups:
            if self.left < WORTH_STARTING:
                self.rows += [not_run(s, "all of it", "no time was left") for s in sections]
                continue
            written = folder / "rows.jsonl"
            written.write_text("")
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.worker"]
            command += ["--sizes", "smoke" if self._is_smoke else "full"]
            command += ["--folder", str(folder), "--rows", str(written), *sections]
            seconds = min(self.left, SECTION_AT_MOST)
            tail = self._run(command, seconds)
            self.rows += [row_of(line) for line in written.read_text().splitlines()]
            if tail:
                state = not_run if tail.startswith(OUT_OF_TIME) else failed
                self.rows.append(state(", ".join(sections), "the rest of it", tail))
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
        """ "" for a command that ended well, else its last words."""
        try:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{OUT_OF_TIME} {seconds:.0f} s"
        return (
            "" if done.returncode == 0 else done.stdout.strip()[-500:] or f"code {done.returncode}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--cpu-smoke", action="store_true")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "gpu")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g} is no time; give a number above 0")
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    with tempfile.TemporaryDirectory() as folder:
        run.record_doctor()
        run.write()
        run.test(Path(folder))
        run.write()
        run.measure(Path(folder))
    counts = {state: sum(row.state == state for row in run.rows) for state in _STATES}
    print(", ".join(f"{count} rows {state}" for state, count in counts.items()))
    print(args.output / "gpu.json")
    print(args.output / "gpu.html")
    return 1 if counts["failed"] else 0


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
