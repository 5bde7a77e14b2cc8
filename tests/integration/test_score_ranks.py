"""`instruct` with score ranks through the training program, on toy data from files.

fp32. Runs with the U-Net beside the decoder are the reference; what a layout may change is the
order of sums.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from megatron_kosmosg import exit_codes
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.stand_in_networks import write_clip
from tests.support.data_helpers import overwrite_image
from tests.support.ranks import run_ranks, run_ranks_until_they_end
from tests.support.score_runs import Event, Outcome, program
from tests.support.toy_runs import arguments_of, config_of, records, train_from_nothing, write_data

ITERATIONS, MIDDLE = 6, 3
SETTINGS = (
    f"training.train_iters={ITERATIONS}",
    "training.global_batch_size=4",
    "training.eval_interval=3",
    "logging.image_interval=3",
    "evaluation.grid=[toy,clip]",
    "evaluation.every=3",
    "evaluation.num_prompts=10",  # two more than the image grid has
    f"checkpoint.save_interval={MIDDLE}",
    "checkpoint.keep_last=0",
    "parallel.timeout_seconds=60",
)
DEDICATED = "score.placement=dedicated"
TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = ("parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=decoder*2|decoder*2,M")
LAYOUTS = {
    "tp1_k1": (2, (1,), ()),
    "tp2_k1": (3, (2,), (TP2, "checkpoint.async_save=true")),
    "tp1_k2": (3, (1, 2), ("score.ranks_per_replica=2",)),
    "shared": (3, (2,), ("score.replicas_per_rank=2",)),
    "pp2_k1": (3, (2,), PP2),
}
"""{name: (ranks, score ranks, settings)}."""
BOUND = 1e-5
CONDITION_BYTES = 21 * 96 * 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, and an `align` checkpoint to start from."""
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder, ("caption", "edit", "compositional"))
    write_clip(folder / "clip")
    short = ("training.train_iters=2", "logging.num_images=0")
    run_ranks(1, train_from_nothing, config_of("align", folder, folder / "align", None, *short))
    return folder


def arguments(world: Path, folder: Path, *more: str) -> list[str]:
    clip = f"evaluation.clip={world / 'clip'}"
    return arguments_of("instruct", world, folder, world / "align", *SETTINGS, clip, *more)


def curve(folder: Path, first: int = 1) -> list[tuple]:
    """(iteration, loss, gradient norm, held-out loss) from iteration `first` on."""
    rows = [(row[0], row[1], row[2], row[5]) for row in records(folder) if row[0] >= first]
    return [tuple(math.nan if value is None else value for value in row) for row in rows]


def measured(folder: Path) -> list[dict[str, float]]:
    """What CLIP said of the drawn images, and of the words that asked for them."""
    names = ("heldout_clip_similarity", "heldout_clip_text_similarity")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names} for line in lines if "lr" not in line]


def assert_close(found: list[tuple], expected: list[tuple]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=BOUND, nan_ok=True), (one, other)


@pytest.fixture(scope="module")
def colocated(world) -> Path:
    """A run on one rank, with checkpoints of iterations 3 and 6."""
    folder = world / "colocated"
    (outcome,) = run_ranks(1, program, arguments(world, folder))
    assert outcome.code == 0, outcome.said
    assert not outcome.frozen_changed and not outcome.frozen_with_buffers
    assert outcome.trained > 0 and outcome.diffusion and outcome.model
    assert len(curve(folder)) == ITERATIONS + ITERATIONS // 3
    return folder


Run = Callable[[str], tuple[Path, list[Outcome]]]


@pytest.fixture(scope="module")
def dedicated(world) -> Run:
    """The run of a layout, made when it is first asked for."""

    @lru_cache
    def run(name: str) -> tuple[Path, list[Outcome]]:
        num_ranks, _, settings = LAYOUTS[name]
        line = arguments(world, world / name, DEDICATED, *settings)
        return world / name, run_ranks(num_ranks, program, line)

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_program_trains_evaluates_draws_and_saves(name, dedicated, colocated):
    folder, outcomes = dedicated(name)
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes[0].said
    assert_close(curve(folder), curve(colocated))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "lr" in line:
            assert 0 < line["decoder_idle"] < 1 and 0 < line["score_idle"] <= 1
            assert line["link_mib"] > 2 * 4 * CONDITION_BYTES / 2**20  # four images, both ways
        else:  # images were drawn by a score rank and judged
            assert math.isfinite(line["heldout_loss"]) and "heldout_toy_hue_mean" in line
    assert measured(folder) == [pytest.approx(each, abs=1e-3) for each in measured(colocated)]
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["iter_0000003", "iter_0000006"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_rank_holds_its_part_and_the_frozen_part_never_changes(name, dedicated):
    _, score_ranks, _ = LAYOUTS[name]
    for rank, outcome in enumerate(dedicated(name)[1]):
        if rank in score_ranks:
            assert not outcome.model and outcome.trained == 0
            assert any(key.startswith("conv_in.") for key in outcome.diffusion)
            assert any(key.startswith("encoder.") for key in outcome.diffusion)
            assert "target_pixel_values" in outcome.read
            assert not outcome.read & {"tokens", "pixel_values"}
        else:
            assert outcome.model and not outcome.diffusion and outcome.trained > 0
            assert "target_pixel_values" not in outcome.read
            loads = not (name == "tp2_k1" and rank == 1)  # the other tensor rank gets the batch
            assert ("tokens" in outcome.read) == loads
            decodes = loads and not (name == "pp2_k1" and rank == 1)
            assert ("pixel_values" in outcome.read) == decodes
        assert not outcome.frozen_changed and not outcome.frozen_with_buffers


def continued(start: Path, folder: Path) -> Path:
    """A copy of the run as it stood at its first checkpoint."""
    name = f"iter_{MIDDLE:07d}"
    shutil.copytree(start / "checkpoints" / name, folder / "checkpoints" / name)
    lines = (start / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["iteration"] <= MIDDLE]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    return folder


def test_checkpoints_go_from_either_placement_to_the_other(world, colocated, dedicated, tmp_path):
    """The dedicated one was saved in the background."""
    expected = curve(colocated, MIDDLE + 1)
    folder = continued(colocated, tmp_path / "to")
    outcomes = run_ranks(3, program, arguments(world, folder, DEDICATED, TP2))
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes[0].said
    assert_close(curve(folder, MIDDLE + 1), expected)
    folder = continued(dedicated("tp2_k1")[0], tmp_path / "from")
    (outcome,) = run_ranks(1, program, arguments(world, folder))
    assert outcome.code == 0, outcome.said
    assert_close(curve(folder, MIDDLE + 1), expected)


@pytest.fixture
def with_bad_images(world, tmp_path) -> tuple[str, ...]:
    """Settings of a mixture of nearly only `edit`: bad targets, bad prompts, and both."""
    for file in (world / "data" / "train").glob("edit.*"):
        shutil.copy(file, tmp_path / file.name)
    for sample in range(12):
        for part in ((1,), (0,), (0, 1))[sample % 3]:
            overwrite_image(tmp_path / "edit", sample, part)
    weights = {"edit": 100, "caption": 1, "compositional": 1}
    mixture = [f"data.blend.{name}.weight={weight}" for name, weight in weights.items()]
    return (f"data.blend.edit.path={tmp_path / 'edit'}", *mixture)


def test_bad_images_cost_the_same_in_every_layout(world, with_bad_images, tmp_path):
    more = (*with_bad_images, "training.train_iters=3", "training.global_batch_size=8")
    runs = {
        "beside": (1, ()),
        "apart": (3, (DEDICATED, "score.ranks_per_replica=2")),
        # The last pipeline stage decodes no prompt and is told what was replaced.
        "stages": (2, PP2),
    }
    for name, (num_ranks, settings) in runs.items():
        run = arguments(world, tmp_path / name, *more, *settings)
        for outcome in run_ranks(num_ranks, program, run):
            assert outcome.code == 0, outcome.said
    counts = bad_samples(tmp_path / "beside")
    assert counts[-1] >= 4
    for name in runs:
        assert_close(curve(tmp_path / name), curve(tmp_path / "beside"))
        assert bad_samples(tmp_path / name) == counts, name


def bad_samples(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["bad_samples"] for line in lines if "lr" in line]


DROPOUT = (DEDICATED, "model.decoder.hidden_dropout=0.1", "score.ranks_per_replica=2")


@pytest.fixture(scope="module")
def with_dropout(world) -> Path:
    folder = world / "dropout"
    outcomes = run_ranks(3, program, arguments(world, folder, *DROPOUT))
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes[0].said
    return folder


def test_signals_to_any_rank_save_and_the_last_rerun_ends_the_same(world, with_dropout, tmp_path):
    """One to the decoder rank, in the rerun one to a score rank."""
    run, first = arguments(world, tmp_path, *DROPOUT), random.randint(1, ITERATIONS - 3)
    # An update has two micro-batches; which score rank gets them is known afterwards.
    to_decoder = Event(0, 2 * first, signal.SIGTERM)
    to_score = Event(2, random.randint(1, 2), signal.SIGUSR1)
    stopped = []
    for event in (to_decoder, to_score):
        outcomes = run_ranks(3, program, run, event)
        assert [outcome.code for outcome in outcomes] == [85, 85, 85], outcomes[0].said
        stopped.append(curve(tmp_path)[-1][0])
    assert stopped[0] == first < stopped[1] < ITERATIONS
    outcomes = run_ranks(3, program, run)
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes[0].said
    assert records(tmp_path) == records(with_dropout), f"signals in iterations {stopped}"


def test_with_its_last_score_rank_killed_a_run_is_saved_and_the_rerun_goes_on(
    world, colocated, tmp_path
):
    """It dies while its decoder rank waits for it, in the update after the save."""
    run = arguments(world, tmp_path, DEDICATED, "score.wait_seconds=2")
    event = Event(1, 2 * MIDDLE + 3, signal.SIGKILL)  # in the second update after it
    decoder, score = run_ranks_until_they_end(2, program, run, event)
    assert score.exit_code == 0, "its job goes on"
    assert decoder.answer.code == 85, decoder.answer.said
    assert "score rank 1 is gone; 0 left" in decoder.answer.said
    assert "no score rank is left: training waits up to 2 s for one" in decoder.answer.said
    assert curve(tmp_path)[-1][0] == MIDDLE + 1
    outcomes = run_ranks(2, program, run)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].said
    assert_close(curve(tmp_path), curve(colocated))


def test_a_score_rank_that_raises_from_the_start_ends_all_with_its_own_error(world, tmp_path):
    run = arguments(world, tmp_path, DEDICATED, TP2)
    outcomes = run_ranks(3, program, run, Event(2, 1, "raise"))
    assert [outcome.code for outcome in outcomes] == [1, 1, 1]
    assert "rank 2 failed" in outcomes[2].said
    assert "ArithmeticError: this rank's own trouble" in outcomes[2].said
    assert "the run ends because of the failure in" in outcomes[0].said  # once, not once a rank
    assert "ends because" not in outcomes[1].said
    assert all("Traceback" not in outcome.said for outcome in outcomes[:2])


def test_a_score_rank_that_stands_still_is_waited_for_no_longer_than_said(world, tmp_path):
    run = arguments(world, tmp_path, DEDICATED, "score.wait_seconds=1", "score.answer_seconds=1")
    event = Event(1, 3, "freeze", seconds=16)
    decoder, score = run_ranks(2, program, run, event)
    assert decoder.code == 85 and "score rank 1 is late" in decoder.said
    assert decoder.seconds < score.seconds - 3
    # What the decoder rank said last has waited for it, unless the connection had been given up.
    assert score.code == 85 or "no connection for 10 s" in score.said


def test_a_diffusion_folder_that_only_score_ranks_open_is_said_in_one_line(world, tmp_path):
    """Its files have their names, which is what decoder ranks look at; the U-Net's are cut off."""
    whole = assets.path() / "stable-diffusion"
    (tmp_path / "sd" / "unet").mkdir(parents=True)
    for part in ("vae", "scheduler", "unet/config.json"):
        (tmp_path / "sd" / part).symlink_to(whole / part)
    name = "unet/diffusion_pytorch_model.safetensors"
    (tmp_path / "sd" / name).write_bytes((whole / name).read_bytes()[:-100])
    run = arguments(world, tmp_path / "run", DEDICATED, f"model.diffusion.path={tmp_path / 'sd'}")
    decoder, score = run_ranks(2, program, run)
    assert (decoder.code, score.code) == (exit_codes.FAILURE, exit_codes.BAD_INPUT)
    assert f"model.diffusion.path={tmp_path / 'sd'} cannot be read" in score.said
    assert "Traceback" not in score.said + decoder.said
