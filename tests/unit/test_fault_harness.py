"""The harness of the fault tests: whatever its seed, it aims at phases that are there, and ends.

No ranks: a start of a run is played here, as slow and as unlucky as ranks may be.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_kosmosg.config.schema import RunConfig
from tests.support import fault_harness
from tests.support.fake_stage import fake_config
from tests.support.fault_harness import BACKGROUND_ONLY, ITERATIONS, Ends, Torment, World
from tests.support.fault_runs import Death, Kill, Lived

STAYS = {
    "load": ((1, 0.3), (1, 0.2)),
    "forward": ((24, 0.01), (24, 0.02)),
    "P2P": ((48, 0.004), (48, 0.001)),
    "score wait": ((16, 0.1), None),
    "scoring": (None, (16, 0.08)),
    "save": ((8, 0.05), (8, 0.05)),
    BACKGROUND_ONLY: ((4, 0.002), None),
    "data build": (None, (1, 0.01)),
}
"""(how often, median of the seconds) each of two ranks is in a phase in a whole run."""

FAKE = ("load", "forward", "P2P", "save", BACKGROUND_ONLY, "data build")
INSTRUCT = ("score wait", "scoring")


class PlayedRuns:
    """Starts of runs, as Torment wants them; keeps the kills that it was given."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"played {seed}")
        self._starts: Counter[str] = Counter()
        self.kills: list[Kill] = []
        self.late = 0
        """Kills after the last save, which the other rank did not hear of."""

    def __call__(self, world: World, config: RunConfig, kill: Kill | None) -> Ends:
        folder = Path(config.logging.output_dir)
        folder.mkdir(exist_ok=True)
        self._starts[folder.name] += 1
        if kill is not None:
            self.kills.append(kill)
            victim = 1 if kill.rank is None else kill.rank
            count, median = STAYS[kill.phase][victim]
            # What a run that was started again still has to do.
            count = 0 if self._is_absent(kill, config) else -(-count // self._starts[folder.name])
            if kill.entry <= count:
                is_inside = kill.delay < median * self._random.uniform(0.5, 2)
                is_late = not is_inside and kill.phase == "save" and kill.entry == count
                iteration, heartbeat = (ITERATIONS, "saving") if is_late else (1, "model")
                death = Death((kill.phase,) if is_inside else (), iteration, heartbeat)
                other = self._lived(1 - victim, config) if is_late else Lived(1, "", "")
                self.late += is_late
                return Ends([None, other] if victim == 0 else [other, None], victim, death)
        return Ends([self._lived(rank, config) for rank in range(2)])

    def _is_absent(self, kill: Kill, config: RunConfig) -> bool:
        return kill.phase == BACKGROUND_ONLY and not config.checkpoint.async_save

    def _lived(self, rank: int, config: RunConfig) -> Lived:
        seconds = {
            phase: [stays[rank][1]] * stays[rank][0]
            for phase, stays in STAYS.items()
            if stays[rank] and (phase != BACKGROUND_ONLY or config.checkpoint.async_save)
        }
        return Lived(0, "", "the same", seconds)


def played_world(phases: tuple[str, ...]) -> World:
    training = {"train_iters": ITERATIONS}
    return World("played", 2, lambda folder: fake_config(folder, training=training), phases)


@pytest.mark.parametrize("phases", [FAKE, INSTRUCT], ids=["fake", "instruct"])
def test_every_seed_of_a_thousand_hits_every_phase(phases, tmp_path, monkeypatch):
    last = Path(f"iter_{ITERATIONS:07d}")  # played runs leave no checkpoints to look at
    monkeypatch.setattr(fault_harness, "latest_valid", lambda folder: last)
    world, places, late = played_world(phases), Counter(), 0
    for seed in range(1000):
        runs = PlayedRuns(seed)
        torment = Torment(world, tmp_path, seed, runs)
        targets = list(phases) * 2
        random.Random(seed).shuffle(targets)
        torment.run(targets)
        assert torment.hits == Counter(targets), seed
        late += runs.late
        for kill in runs.kills:
            count, _ = STAYS[kill.phase][1 if kill.rank is None else kill.rank]
            longest = max(stays[1] for stays in STAYS[kill.phase] if stays)
            assert 1 <= kill.entry <= max(1, count // 2) and 0 <= kill.delay < longest, seed
            places[kill.phase, kill.rank] += 1
    builder = {("data build", None)} if "data build" in phases else set()
    expected = {(p, r) for p in phases for r in range(2) if STAYS[p][r] and p != "data build"}
    assert set(places) == expected | builder
    assert late or "save" not in phases


def test_a_rank_that_ends_well_before_its_time_is_a_failure(tmp_path):
    class Deaf(PlayedRuns):
        def __call__(self, world: World, config: RunConfig, kill: Kill | None) -> Ends:
            ends = super().__call__(world, config, kill)
            if ends.victim is not None:
                ends.lived[1 - ends.victim] = self._lived(1 - ends.victim, config)
            return ends

    torment = Torment(played_world(INSTRUCT), tmp_path, 1, Deaf(1))
    with pytest.raises(AssertionError, match="rank 0: Lived\\(code=0"):
        torment.run(["scoring"])


def test_a_phase_that_no_run_has_is_named(tmp_path):
    with pytest.raises(AssertionError, match=r"never was in \['lunch'\]"):
        Torment(played_world(("load", "lunch")), tmp_path, 1, PlayedRuns(1))


def test_kills_that_never_come_end_the_runs(tmp_path):
    class Immortal(PlayedRuns):
        def _is_absent(self, kill: Kill, config: RunConfig) -> bool:
            return True

    torment = Torment(played_world(INSTRUCT), tmp_path, 1, Immortal(1))
    with pytest.raises(AssertionError, match="kills do not come"):
        torment.run(["scoring"])
