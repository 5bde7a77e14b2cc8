"""Runs the steps one after the other: logs, stamps, Ctrl-C, and the record the page is made of."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from megatron_kosmosg.files import open_itself, write_json
from quickstart.progress import RemainingTime
from quickstart.stamps import Stamps
from quickstart.steps import Step

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 90
"""Seconds a step gets after Ctrl-C to save its state."""
_TAIL_LINES = 20


class StepFailed(RuntimeError):
    """A command ended with an error; the message says which and where its log is."""


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM; the step that was running has saved what it can."""


class Runner:
    """Runs steps in `repository`, keeping everything in `out`."""

    def __init__(self, steps: list[Step], out: Path, repository: Path, mode: str) -> None:
        self._steps = steps
        self._out = out
        self._repository = repository
        self._mode = mode
        self._stamps = Stamps(out / "steps", steps, repository)
        self._progress = RemainingTime(steps)
        self._environment = child_environment()
        self._interrupted = False
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self._lock = open_itself(out / "steps" / "lock", "a")

    def run(self) -> None:
        """All steps done, or StepFailed / Interrupted raised."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepFailed(f"Another quickstart is running in {self._out}.") from None
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            self._run_all()
        finally:
            self._lock.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run_all(self) -> None:
        for index, step in enumerate(self._steps):
            self._write_record()
            if not step.always and self._stamps.is_done(step):
                is_current = self._stamps.is_current_code(self._stamps.read(step))
                note = "" if is_current else " (by another version of the code; --fresh repeats it)"
                self._progress.reuse(index, "already done" + note)
            else:
                self._run_step(index, step)

    def _run_step(self, index: int, step: Step) -> None:
        stamp = self._stamps.begin(step)
        log = self._out / "logs" / f"{step.name}.log"
        line = shlex.join(["python", *step.command[1:]])
        with open_itself(self._out / "commands.log", "a", "utf-8") as commands:
            commands.write(f"# {datetime.now():%Y-%m-%d %H:%M:%S} {step.title}\n{line}\n")
        self._progress.begin(index)
        started, cpu_started = time.monotonic(), _children_cpu_seconds()
        with open_itself(log, "a", "utf-8") as file:
            file.write(f"\n$ {line}\n")
            file.flush()
            log_start = file.tell()
            # A session of its own keeps the terminal's Ctrl-C away from it: the step is asked to
            # save and stop once, by _wait, instead of all its ranks dying at once.
            process = subprocess.Popen(
                step.command,
                cwd=self._repository,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock.fileno(),),  # locked as long as the step lives, if we die
            )
            status = self._wait(process)
        seconds = time.monotonic() - started
        stamp["seconds"] += seconds
        stamp["cpu_seconds"] += _children_cpu_seconds() - cpu_started
        stamp["done"] = status in step.accepts and not self._interrupted
        self._stamps.write(step, stamp)
        if self._interrupted:
            self._progress.clear()
            raise Interrupted(step.title)
        if status not in step.accepts:
            self._progress.clear()
            raise StepFailed(
                f"{_cause(log, log_start)}\n\n"
                f"Step '{step.title}' ended with exit code {status}. Its log: {log}"
            )
        missing = [str(path) for path in step.outputs if not path.exists()]
        if missing:
            raise StepFailed(f"Step '{step.title}' did not write {missing}. Its log: {log}")
        self._progress.finish(seconds)

    def _wait(self, process: subprocess.Popen) -> int:
        deadline = None
        while True:
            try:
                return process.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            if not self._interrupted:
                self._progress.update()
            elif deadline is None:
                # To the launcher alone: it passes SIGTERM on to its ranks, and they save.
                process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + _GRACE_SECONDS
                self._progress.clear()
                print("Stopping; the running step saves its state ...", flush=True)
            elif time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)

    def _on_signal(self, number: int, frame: object) -> None:
        self._interrupted = True

    def _write_record(self) -> None:
        """OUT/quickstart.json: what ran on what machine, for the page."""
        entries = []
        for step in self._steps:
            stamp = self._stamps.read(step)
            if stamp is not None and stamp["done"]:
                entries.append(
                    {
                        "name": step.name,
                        "title": step.title,
                        "command": shlex.join(["python", *step.command[1:]]),
                        "seconds": stamp["seconds"],
                        "cpu_seconds": stamp["cpu_seconds"],
                    }
                )
        record = {"mode": self._mode, "machine": _machine(), "steps": entries}
        write_json(self._out / "quickstart.json", record)


def child_environment() -> dict[str, str]:
    """One compute thread per rank, no look-ups on a model hub; with fewer than two GPUs the two
    ranks run on the CPU."""
    environment = dict(os.environ)
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        num_gpus = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    except FileNotFoundError:
        num_gpus = 0
    if num_gpus < 2:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _cause(log: Path, start: int) -> str:
    """The end of what was written from byte `start` on."""
    lines = log.read_bytes()[start:].decode("utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _machine() -> dict[str, str | int]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
    }
