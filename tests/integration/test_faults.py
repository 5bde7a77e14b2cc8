"""Ranks killed in every phase of a run: it goes on from its last save and ends at the same numbers.

A run gets several kills in turn and is started again after each; at its end the hash of all
parameters is that of a run that nobody disturbed. `KOSMOSG_FAULT_SEED` repeats a printed seed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_kosmosg.config.paths import packing_folder, save_folder
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.training.checkpoint_folder import is_valid, latest_valid
from tests.fake_stage import fake_config
from tests.fault_runs import Death, Kill, Lived, prepare_marks, read_death, run_marked
from tests.ranks import run_ranks_until_they_end
from tests.tiny_models import replace_section, tiny_config, write_stable_diffusion

ITERATIONS = 8
SAVE_INTERVAL = 2
LONGEST_GOODBYE = 45.0
"""Seconds after a rank's death until the others must have ended: far more than they need, and less
than a collective's timeout."""


@dataclass(frozen=True)
class World:
    """A run to torment: `name` for fault_runs.run_marked, its ranks and its phases."""

    name: str
    num_ranks: int
    config: Callable[[str], RunConfig]
    phases: tuple[str, ...]


def fake_world() -> World:
    """Two pipeline stages, samples through a packing index."""
    parallel = {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder|decoder"}
    sections = {"parallel": parallel, "training": {"train_iters": ITERATIONS, "eval_iters": 1}}
    phases = ("load", "forward", "P2P", "save", "async finalise", "data build")
    return World("fake", 2, lambda folder: fake_config(folder, **sections), phases)


def instruct_world(stable_diffusion: Path) -> World:
    """A decoder rank and a rank that holds the U-Net alone."""

    def config(folder: str) -> RunConfig:
        config = tiny_config("instruct", stable_diffusion, Path(folder))
        config = replace_section(config, "score", placement="dedicated")
        config = replace_section(config, "training", train_iters=ITERATIONS)
        config = replace_section(config, "optimizer", lr=1e-3, lr_warmup_iters=2)
        return replace_section(config, "logging", tensorboard=False)

    return World("instruct", 2, config, ("score wait", "scoring"))


class Torment:
    """Runs of one world, killed again and again, against one that is left alone."""

    def __init__(self, world: World, folder: Path, seed: int) -> None:
        self._world, self._folder, self._marks = world, folder, folder / "marks"
        self._random = random.Random(seed)
        self.hits: Counter[str] = Counter()
        self.log: list[str] = []
        self._runs = self._misses = 0
        self._straight, _ = self._start(self._config("straight"), None)
        assert [lived.code for lived in self._straight] == [0] * world.num_ranks, self._straight

    def run(self, targets: list[str]) -> None:
        """Runs, with a kill aimed at each phase of `targets`, until each has landed there."""
        left, most = list(targets), len(self.log) + 3 * len(targets) + 3
        while left:
            self._runs += 1
            name = f"run{self._runs}"
            while not self._finishes(name, left):
                assert len(self.log) < most, "kills do not land: " + "\n".join(self.log)
            shutil.rmtree(self._folder / name)

    def _finishes(self, name: str, left: list[str]) -> bool:
        """One start of the run, killed if anything is `left`; True when the run was done."""
        config = self._config(name)
        kill = self._draw(left[0]) if left else None
        if kill is not None and kill.phase == "data build":
            shutil.rmtree(packing_folder(config), ignore_errors=True)
        before = latest_valid(save_folder(config))
        ends, victim = self._start(config, kill)
        if victim is None:  # the end came first, if a kill was to come
            self._check_end(ends)
            return True
        death = read_death(self._marks, victim)
        self._say(kill, victim, death)
        self._misses += 1
        if kill.phase in death.phases:
            self.hits[kill.phase] += 1
            self._misses = 0
            left.pop(0)
        for rank, lived in enumerate(ends):
            assert rank == victim or lived.code == 1, f"rank {rank}: {lived}\n{self.log[-1]}"
        self._check_checkpoints(config, before, death)
        return False

    def _config(self, name: str) -> RunConfig:
        """Saves in the foreground or the background, as it happens."""
        config = self._world.config(str(self._folder / name))
        is_async = self._random.random() < 0.5
        return replace_section(
            config, "checkpoint", save_interval=SAVE_INTERVAL, async_save=is_async
        )

    def _draw(self, phase: str) -> Kill:
        """A kill at a random moment of the phase, within some iterations of the start.

        As the undisturbed run took its time; after a kill that came too late, earlier.
        """
        stays = {
            rank: lived.seconds[phase]
            for rank, lived in enumerate(self._straight)
            if phase in lived.seconds
        }
        rank = self._random.choice(list(stays))
        longest = max(statistics.median(stay) for stay in stays.values())
        soon = max(1, len(stays[rank]) * 2 * SAVE_INTERVAL // ITERATIONS)
        delay = 0.9 * longest * self._random.random() * 0.3**self._misses
        # One rank builds the index, the others then have it.
        victim = None if phase == "data build" else rank
        return Kill(victim, phase, self._random.randint(1, soon), delay)

    def _start(self, config: RunConfig, kill: Kill | None) -> tuple[list[Lived | None], int | None]:
        """(what the ranks say at their end, the one that was killed)."""
        world = self._world
        prepare_marks(self._marks)
        arguments = (world.name, config, str(self._marks), kill)
        ends = run_ranks_until_they_end(world.num_ranks, run_marked, *arguments)
        dead = [rank for rank, end in enumerate(ends) if end.exit_code == -signal.SIGKILL]
        lived = [end.answer for end in ends]
        assert lived.count(None) == len(dead) <= (kill is not None), ends
        if not dead:
            return lived, None
        goodbye = max(end.at for end in ends) - ends[dead[0]].at
        assert goodbye < LONGEST_GOODBYE, f"{goodbye:.0f} s after {kill} all had ended"
        return lived, dead[0]

    def _say(self, kill: Kill, victim: int, death: Death) -> None:
        where = " and ".join(death.phases) or "no phase"
        self.log.append(
            f"{self._world.name} kill {len(self.log) + 1}: rank {victim} in {where} "
            f"(heartbeat: {death.heartbeat} of iteration {death.iteration}; aimed at "
            f"{kill.phase} {kill.entry} + {1000 * kill.delay:.1f} ms)"
        )
        print(self.log[-1], flush=True)

    def _check_checkpoints(self, config: RunConfig, before: Path | None, death: Death) -> None:
        """What has a final name is whole, and no more than the last iterations are lost."""
        named = [path for path in save_folder(config).glob("iter_*") if path.suffix != ".tmp"]
        assert all(is_valid(path) for path in named), (self.log[-1], named)
        newest = latest_valid(save_folder(config))
        assert before is None or newest >= before, self.log[-1]
        if death.heartbeat in ("training", "evaluation", "saving"):
            done = death.iteration - (death.heartbeat == "training")
            saved = 0 if newest is None else int(newest.name[5:])
            under_way = 2 if config.checkpoint.async_save else 1
            assert done - saved <= under_way * SAVE_INTERVAL, self.log[-1]

    def _check_end(self, ends: list[Lived]) -> None:
        told = "\n".join(self.log)
        assert [lived.code for lived in ends] == [0] * len(ends), f"{ends}\n{told}"
        found, wanted = ([r.parameters for r in ranks] for ranks in (ends, self._straight))
        assert found == wanted, f"other parameters than the undisturbed run after\n{told}"


def seed() -> int:
    return int(os.environ.get("KOSMOSG_FAULT_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    stable_diffusion = write_stable_diffusion(tmp_path_factory.mktemp("sd"))
    return {world.name: world for world in (fake_world(), instruct_world(stable_diffusion))}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("times", [2, pytest.param(13, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["fake", "instruct"])
def test_a_rank_killed_in_any_phase_costs_nothing_but_time(worlds, name, times, tmp_path):
    """Every phase is hit `times` times: 16 kills in both worlds, or 104."""
    number, world = seed(), worlds[name]
    print(f"KOSMOSG_FAULT_SEED={number}")
    torment = Torment(world, tmp_path, number)
    targets = list(world.phases) * times
    random.Random(number).shuffle(targets)
    torment.run(targets)
    print(f"{len(torment.log)} kills, by phase: {dict(torment.hits)}")
    assert all(torment.hits[phase] == times for phase in world.phases), torment.hits
