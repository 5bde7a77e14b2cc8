"""Score ranks join a run of 30 updates (60 with --full), leave it, die, raise, stand still, dawdle
and lie: it ends at the hash of the run that nobody disturbed."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.config.paths import (
    FAILURE_FILE,
    LOST_RANKS_FILE,
    METRICS_FILE,
    SCORE_RANKS_FILE,
)
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.monitoring.fleet_size import answers_in
from tests.support.digests import newest_checkpoint, parameters
from tests.support.fault_runs import Lived
from tests.support.fleet_runs import Habit, rank_of_job, start_guest, wait_for_iteration
from tests.support.ranks import Ended, run_ranks_until_they_end
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion

MICRO_BATCHES = 2


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module", params=[30, pytest.param(60, marks=pytest.mark.slow)])
def updates(request) -> int:
    """Of a run."""
    return request.param


def config_of(stable_diffusion: Path, folder: Path, updates: int, **score) -> RunConfig:
    """With dropout, so that a micro-batch computed twice on the decoder's side would show."""
    config = tiny_config("instruct", stable_diffusion, folder)
    score = {"placement": "dedicated", "ranks_per_replica": 2, "answer_seconds": 3.0, **score}
    config = replace_section(config, "score", **score)
    config = replace_section(config, "training", train_iters=updates)
    config = replace_section(config, "optimizer", lr=1e-3, lr_warmup_iters=2)
    return replace_section(config, "logging", tensorboard=False)


class Job:
    """The ranks of a run: a decoder rank and two score ranks, in the background."""

    def __init__(self, config: RunConfig, habits: dict[int, Habit] | None = None) -> None:
        self._ended: list[Ended] = []
        self._thread = threading.Thread(target=self._run, args=(config, habits or {}))
        self._thread.start()

    def _run(self, config: RunConfig, habits: dict[int, Habit]) -> None:
        self._ended += run_ranks_until_they_end(3, rank_of_job, config, habits)

    def exit_codes(self) -> list[int]:
        """Of the ranks' processes, once `decoder` has ended."""
        return [ended.exit_code for ended in self._ended]

    def decoder(self) -> Lived:
        """What the decoder rank says at its end."""
        self._thread.join()
        assert self._ended[0].answer is not None, self._ended
        return self._ended[0].answer


@pytest.fixture(scope="module")
def straight(tmp_path_factory, updates) -> Path:
    """Folder of the run that nobody disturbs."""
    return tmp_path_factory.mktemp(f"straight{updates}")


@pytest.fixture(scope="module")
def undisturbed(stable_diffusion, updates, straight) -> tuple[str, list]:
    """Hash of the parameters, and the losses."""
    lived = Job(config_of(stable_diffusion, straight, updates)).decoder()
    assert lived.code == 0, lived.said
    assert not (straight / SCORE_RANKS_FILE).exists()
    assert "unlike" not in lived.said and len(hardware_of(straight)) == 1
    return lived.parameters, losses(straight)


def hardware_of(folder: Path) -> dict[str, int]:
    """{kind: answers} of a run."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return dict(sum((Counter(answers_in(line)) for line in lines), Counter()))


def losses(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [(line["iteration"], line["loss"], line["grad_norm"]) for line in lines if "lr" in line]


def ends_as(undisturbed: tuple[str, list], lived: Lived, folder: Path) -> bool:
    assert lived.code == 0, lived.said
    assert losses(folder) == undisturbed[1], lived.said
    return lived.parameters == undisturbed[0]


def test_half_killed_twice_and_new_ones_twice(stable_diffusion, updates, undisturbed, tmp_path):
    habits = {2: Habit(dies_at=updates // 8 * MICRO_BATCHES // 2)}
    job = Job(config_of(stable_diffusion, tmp_path, updates), habits)
    wait_for_iteration(tmp_path, updates // 5)
    assert (tmp_path / SCORE_RANKS_FILE).stat().st_mode & 0o777 == 0o600
    first = start_guest(tmp_path, Habit(dies_at=updates // 6))
    wait_for_iteration(tmp_path, updates // 2)
    second = start_guest(tmp_path)
    lived = job.decoder()
    assert ends_as(undisturbed, lived, tmp_path)
    assert job.exit_codes() == [0, 0, 0], "a dead score rank is no failure of its job"
    for guest in (first, second):
        guest.join(60)
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)
    assert "score rank 2 is gone; 1 left" in lived.said
    assert lived.said.count("has joined") == 2 and lived.said.count("is gone") == 2


def test_a_third_of_the_answers_late_and_a_rank_that_stands_still(
    stable_diffusion, updates, undisturbed, tmp_path
):
    late = {"delays": 3, "delay": 0.3}
    habits = {1: Habit(**late), 2: Habit(**late, freezes_at=10, frozen=4)}
    config = config_of(stable_diffusion, tmp_path, updates, answer_seconds=0.2)
    lived = Job(config, habits).decoder()
    assert ends_as(undisturbed, lived, tmp_path)
    for rank in (1, 2):
        assert f"score rank {rank} is late; its requests go to others" in lived.said


def test_an_error_a_lie_and_a_guest_that_is_told_to_stop(
    stable_diffusion, updates, undisturbed, tmp_path
):
    config = config_of(stable_diffusion, tmp_path, updates, audit_rate=1.0)
    job = Job(config, {2: Habit(raises_at=updates // 3)})
    wait_for_iteration(tmp_path, 2)
    liar, honest = start_guest(tmp_path, Habit(lies=True)), start_guest(tmp_path)
    wait_for_iteration(tmp_path, 2 * updates // 3)
    honest.terminate()
    honest.join(60)
    liar.join(60)
    assert (honest.exitcode, liar.exitcode) == (85, 2)
    lived = job.decoder()
    assert ends_as(undisturbed, lived, tmp_path)
    assert job.exit_codes() == [0, 0, 0], "a task that fails would end the job"
    assert lived.said.count("has joined (CPU ") == 2 and "has left; " in lived.said
    assert "is evicted: its numbers for a request are not those of score rank" in lived.said
    trouble = "ArithmeticError: this rank's own trouble"
    assert f"score rank 2 failed: {trouble}; " in lived.said
    lost = (tmp_path / LOST_RANKS_FILE).read_text()
    assert "score rank 2 on " in lost and "Traceback" in lost and lost.endswith(f"{trouble}\n\n")
    assert not (tmp_path / FAILURE_FILE).exists()


def test_ranks_of_unlike_hardware_are_named_and_move_the_run_by_rounding_alone(
    stable_diffusion, updates, undisturbed, straight, tmp_path
):
    """fp32: each kind rounds by 1e-6 of a gradient (tests/unit/test_score_rounding.py). Found after
    30 updates: losses 8e-7 apart, parameters at most 9e-7 (1e-8 in the mean) of the 0.03 that Adam
    could have moved one. Another CPU rounds elsewhere: the bounds are over ten times of that."""
    lived = Job(
        config_of(stable_diffusion, tmp_path, updates), {2: Habit(is_unlike=True)}
    ).decoder()
    assert lived.code == 0, lived.said
    answers = hardware_of(tmp_path)
    assert len(answers) == 2 and sum(answers.values()) == updates * MICRO_BATCHES
    assert lived.said.count("answers of unlike kinds, which round differently: ") == 1
    assert all(kind in lived.said and kind.endswith(" fp32") for kind in answers)
    for found, expected in zip(losses(tmp_path), undisturbed[1], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    first, second = (parameters(newest_checkpoint(folder)) for folder in (straight, tmp_path))
    assert first.keys() == second.keys()
    gaps = torch.cat([(first[name] - second[name]).flatten().double() for name in first])
    assert 0 < gaps.abs().max() < 3e-5
    assert gaps.square().mean().sqrt() < 1e-6
