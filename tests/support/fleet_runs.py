"""Runs of `instruct` whose score ranks come and go: ranks of the job, and guests that join it."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from megatron_kosmosg import train
from megatron_kosmosg.cli import score_rank
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.score import service
from megatron_kosmosg.score.keyed_noise import KeyedNoise
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.messages import Answer, ScoreRequest
from megatron_kosmosg.training.metrics import METRICS_FILE
from tests.support.fault_runs import Lived, parameters_hash, use_stage

PACE = 0.05
"""Seconds that every answer takes longer, so that guests have time to join a tiny run."""


@dataclass(frozen=True)
class Habit:
    """What a score rank does besides its work."""

    dies_at: int = 0
    """SIGKILL at its n-th request; 0: never."""
    freezes_at: int = 0
    """SIGSTOP at its n-th request, for `frozen` seconds."""
    frozen: float = 0.0
    delays: int = 0
    """Every n-th answer is late by `delay` seconds."""
    delay: float = 0.0
    raises_at: int = 0
    """An error at its n-th request; 0: never."""
    lies: bool = False
    """Its gradients are a hundredth too large."""
    is_unlike: bool = False
    """It rounds as other hardware does: rows one by one, sums split between two threads."""


def rank_of_job(config: RunConfig, habits: dict[int, Habit]) -> Lived:
    """The training program as this rank, and all that it prints; habits: of ranks."""
    built: list[torch.nn.Module] = []
    use_stage("instruct", built)
    _take_up(habits.get(int(os.environ["RANK"]), Habit()))
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        code = train.run(config)
    return Lived(code, output.getvalue(), parameters_hash(built))


def start_guest(folder: Path, habit: Habit = Habit()) -> BaseProcess:
    """A process that joins the run in `folder`; its exit code is the command's."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_guest, args=(str(folder), habit))
    process.start()
    return process


def wait_for_iteration(folder: Path, iteration: int) -> None:
    """Returns when the run in `folder` has made so many."""
    deadline, file = time.monotonic() + 120, folder / METRICS_FILE
    while not file.is_file() or len(file.read_text().splitlines()) < iteration:
        assert time.monotonic() < deadline, f"iteration {iteration} did not come"
        time.sleep(0.05)


def _guest(folder: str, habit: Habit) -> None:
    torch.set_num_threads(1)
    use_stage("instruct", [])
    _take_up(habit)
    raise SystemExit(score_rank.main(["--run", folder, "--wait", "60"]))


def _take_up(habit: Habit) -> None:
    answer: Callable[..., Answer] = service._Work.answer
    calls = 0

    def behave(self: service._Work, request: ScoreRequest, idle: float, number: int) -> Answer:
        nonlocal calls
        calls += 1
        time.sleep(PACE)
        if calls == habit.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == habit.raises_at:
            raise ArithmeticError("this rank's own trouble")
        if calls == habit.freezes_at:
            wake = f"sleep {habit.frozen}; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", wake])
            os.kill(os.getpid(), signal.SIGSTOP)
        if habit.delays and calls % habit.delays == 0:
            time.sleep(habit.delay)
        true = answer(self, request, idle, number)
        if not habit.lies:
            return true
        wrong = true.payload * 1.01
        return Answer(true.loss, true.bad_samples, true.signal, idle, true.seconds, wrong)

    service._Work.answer = behave
    if habit.is_unlike:
        torch.set_num_threads(2)
        DenoisingLoss.__call__ = _by_row(DenoisingLoss.__call__)


def _by_row(denoise: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def denoise_by_row(
        self: DenoisingLoss,
        condition: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor,
        stream: str,
        keyed_noise: KeyedNoise | None = None,
    ) -> torch.Tensor:
        losses = []
        for row in torch.arange(len(positions)).split(1):
            noise = keyed_noise and {name: values[row] for name, values in keyed_noise.items()}
            losses.append(
                denoise(self, condition[row], targets[row], positions[row], stream, noise)
            )
        return torch.cat(losses)

    return denoise_by_row
