"""Runs that are killed again and again, against one that is left alone.

Which phase is aimed at, when and in which run comes from a seed; how a run is started is handed in,
so that the harness itself can be tested without a rank.
"""

from __future__ import annotations

import random
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_kosmosg import exit_codes
from megatron_kosmosg.checkpoint.folder import is_valid, latest_valid
from megatron_kosmosg.config.paths import packing_folder, save_folder
from megatron_kosmosg.config.schema import RunConfig
from tests.support.fault_runs import Death, Kill, Lived
from tests.support.tiny_models import replace_section

ITERATIONS = 8
SAVE_INTERVAL = 2
BACKGROUND_ONLY = "async finalise"
"""The phase that only a run has that saves in the background."""


@dataclass(frozen=True)
class World:
    """A run to torment: `name` for fault_runs.run_marked, its ranks and its phases."""

    name: str
    num_ranks: int
    config: Callable[[str], RunConfig]
    phases: tuple[str, ...]


@dataclass(frozen=True)
class Ends:
    """How the ranks of one start ended."""

    lived: list[Lived | None]
    """What each says, None from the one that was killed."""
    victim: int | None = None
    death: Death | None = None
    """Where the victim was."""


Start = Callable[[World, RunConfig, Kill | None], Ends]


class Torment:
    """Runs of one world; `start` starts one and waits for its end."""

    def __init__(self, world: World, folder: Path, seed: int, start: Start) -> None:
        self._world, self._folder, self._start = world, folder, start
        self._random = random.Random(seed)
        self.hits: Counter[str] = Counter()
        self.log: list[str] = []
        self._runs = self._misses = 0
        # In the background, whatever the seed: else a phase to aim at would have no times.
        straight = start(world, self._config("straight", is_async=True), None).lived
        assert [lived.code for lived in straight] == [0] * world.num_ranks, straight
        self._straight = straight
        missing = [phase for phase in world.phases if not self._stays(phase)]
        assert not missing, f"the undisturbed run never was in {missing}"

    def run(self, targets: list[str]) -> None:
        """Runs, with a kill aimed at each phase of `targets`, until each has landed there."""
        left = list(targets)
        most_kills, most_runs = len(self.log) + 3 * len(left) + 3, self._runs + 3 * len(left) + 3
        while left:
            self._runs += 1
            assert self._runs < most_runs, "kills do not come: " + "\n".join(self.log)
            name = f"run{self._runs}"
            while not self._finishes(name, left):
                assert len(self.log) < most_kills, "kills do not land: " + "\n".join(self.log)
            shutil.rmtree(self._folder / name)

    def _finishes(self, name: str, left: list[str]) -> bool:
        """One start of the run, killed if anything is `left`; True when the run was done."""
        is_async = self._random.random() < 0.5 or left[:1] == [BACKGROUND_ONLY]
        config = self._config(name, is_async)
        kill = self._draw(left[0]) if left else None
        if kill is not None and kill.phase == "data build":
            shutil.rmtree(packing_folder(config), ignore_errors=True)
        before = latest_valid(save_folder(config))
        ends = self._start(self._world, config, kill)
        if ends.victim is None:  # the end came first, if a kill was to come
            self._check_end(ends.lived)
            return True
        self._say(kill, ends.victim, ends.death)
        self._misses += 1
        if kill.phase in ends.death.phases:
            self.hits[kill.phase] += 1
            self._misses = 0
            left.pop(0)
        for rank, lived in enumerate(ends.lived):
            if rank != ends.victim and not self._was_done(rank, lived, ends.death):
                # Without its score rank a decoder rank saves first.
                allowed = (exit_codes.FAILURE, exit_codes.STOPPED)
                assert lived.code in allowed, f"rank {rank}: {lived}\n{self.log[-1]}"
        self._check_checkpoints(config, before, ends.death)
        return False

    def _was_done(self, rank: int, lived: Lived, death: Death) -> bool:
        """Whether the rank had nothing more to do with the victim, which died in the last save."""
        is_last = death.iteration == ITERATIONS and death.heartbeat == "saving"
        return is_last and lived.code == 0 and lived.parameters == self._straight[rank].parameters

    def _config(self, name: str, is_async: bool) -> RunConfig:
        config = self._world.config(str(self._folder / name))
        return replace_section(
            config, "checkpoint", save_interval=SAVE_INTERVAL, async_save=is_async
        )

    def _stays(self, phase: str) -> dict[int, list[float]]:
        """How long each stay in the phase took, of every rank that was in it, undisturbed."""
        stays = {rank: lived.seconds.get(phase) for rank, lived in enumerate(self._straight)}
        return {rank: seconds for rank, seconds in stays.items() if seconds}

    def _draw(self, phase: str) -> Kill:
        """A kill at a random moment of the phase, within some iterations of the start.

        As the undisturbed run took its time; after a kill that came too late, earlier.
        """
        stays = self._stays(phase)
        rank = self._random.choice(list(stays))
        longest = max(statistics.median(stay) for stay in stays.values())
        soon = max(1, len(stays[rank]) * 2 * SAVE_INTERVAL // ITERATIONS)
        delay = 0.9 * longest * self._random.random() * 0.3**self._misses
        # One rank builds the index, the others then have it.
        victim = None if phase == "data build" else rank
        return Kill(victim, phase, self._random.randint(1, soon), delay)

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
        found, expected = ([r.parameters for r in ranks] for ranks in (ends, self._straight))
        assert found == expected, f"other parameters than the undisturbed run after\n{told}"
