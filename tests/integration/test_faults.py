"""Ranks killed in every phase of a run: it goes on from its last save and ends at the same numbers.

A run gets several kills in turn and is started again after each; at its end the hash of all
parameters is that of a run that nobody disturbed. `KOSMOSG_FAULT_SEED` repeats a printed seed.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from megatron_kosmosg.config.schema import RunConfig
from tests.support.fake_stage import fake_config
from tests.support.fault_harness import ITERATIONS, Ends, Start, Torment, World
from tests.support.fault_runs import Kill, prepare_marks, read_death, run_marked
from tests.support.moment_seeds import moment_seed
from tests.support.ranks import run_ranks_until_they_end
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion

LONGEST_GOODBYE = 45.0
"""Seconds after a rank's death until the others must have ended: far more than they need, and less
than a collective's timeout."""


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
        config = replace_section(config, "score", placement="dedicated", wait_seconds=1.0)
        config = replace_section(config, "training", train_iters=ITERATIONS)
        config = replace_section(config, "optimizer", lr=1e-3, lr_warmup_iters=2)
        return replace_section(config, "logging", tensorboard=False)

    return World("instruct", 2, config, ("score wait", "scoring"))


def start_ranks(marks: Path) -> Start:
    """Starts runs as ranks of this machine, which leave their marks in a folder."""

    def start(world: World, config: RunConfig, kill: Kill | None) -> Ends:
        prepare_marks(marks)
        arguments = (world.name, config, str(marks), kill)
        ends = run_ranks_until_they_end(world.num_ranks, run_marked, *arguments)
        lived = [end.answer for end in ends]
        dead = [rank for rank, answer in enumerate(lived) if answer is None]
        assert len(dead) <= (kill is not None), ends
        # That of a score rank is no failure of its task.
        codes = {ends[rank].exit_code for rank in dead}
        assert codes <= {-signal.SIGKILL, 0} and all(end.error is None for end in ends), ends
        if not dead:
            return Ends(lived)
        goodbye = max(end.at for end in ends) - ends[dead[0]].at
        assert goodbye < LONGEST_GOODBYE, f"{goodbye:.0f} s after {kill} all had ended"
        return Ends(lived, dead[0], read_death(marks, dead[0]))

    return start


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    stable_diffusion = write_stable_diffusion(tmp_path_factory.mktemp("sd"))
    return {world.name: world for world in (fake_world(), instruct_world(stable_diffusion))}


SHARDS = [
    pytest.param(times, None, id=f"{times}-{shard}", marks=pytest.mark.slow)
    for shard, times in enumerate((4, 3, 3, 3), start=1)
]
"""Of 104 kills, each with a seed of the moment: what is run between two interruptions."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("times", "fixed_seed"), [pytest.param(2, 1, id="2"), *SHARDS])
@pytest.mark.parametrize("name", ["fake", "instruct"])
def test_a_rank_killed_in_any_phase_costs_nothing_but_time(
    worlds, name, times, fixed_seed, tmp_path
):
    """Every phase is hit `times` times: 16 kills in both worlds, the same in every run; or 104 in
    all shards."""
    seed, world = moment_seed(fixed_seed), worlds[name]
    torment = Torment(world, tmp_path, seed, start_ranks(tmp_path / "marks"))
    targets = list(world.phases) * times
    random.Random(seed).shuffle(targets)
    torment.run(targets)
    print(f"{len(torment.log)} kills, by phase: {dict(torment.hits)}")
    assert all(torment.hits[phase] == times for phase in world.phases), torment.hits
