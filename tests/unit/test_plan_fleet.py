"""Plans with score ranks of other jobs: schedules by hand, how many are needed, a simulation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import fleet_against_plan
from megatron_kosmosg.cli import plan as command
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.planning.fleet_timeline import Servers, play_fleet
from megatron_kosmosg.planning.gpus import GPUS
from megatron_kosmosg.planning.joined import joined_ranks
from megatron_kosmosg.planning.model_counts import model_shares, whole_model
from megatron_kosmosg.planning.timeline import play

SMALL_CARD = (
    "memory_gib: 2\nbf16_tflops: 10\nfp16_tflops: 10\nfp32_tflops: 5\nmemory_gb_s: 100\n"
    "link_gb_s: 10\nnetwork_gb_s: 1\ncapability: [8, 6]\n"
)
SHARED = (
    "score.placement=dedicated",
    "score.replicas_per_rank=3",
    "score.window=2",
    "training.micro_batch_size=4",
    "training.global_batch_size=96",
)
"""On 4 GPUs: three replicas of eight micro-batches, and one score rank of the job."""


def plan(config: str, num_gpus: int, *arguments: str) -> int:
    return command.main(
        ["--config", config, "--num-gpus", str(num_gpus), "--gpu", "h100-80", *arguments]
    )


# The schedule


def test_nobody_that_joined_changes_nothing():
    dice = random.Random(3)
    for _ in range(40):
        stages, count = dice.randint(1, 4), dice.randint(1, 6)
        forward = [[dice.randint(1, 4) for _ in range(count)] for _ in range(stages)]
        backward = [[dice.randint(1, 6) for _ in range(count)] for _ in range(stages)]
        ahead, link, score = dice.randint(0, 3), dice.randint(0, 2), dice.randint(1, 9)
        alone = play(forward, backward, [score] * count, ahead=ahead, link=link)
        own = Servers(1, score, link)
        found = play_fleet(forward, backward, own, [], units=3, ahead=ahead)
        assert found.seconds == alone.seconds
        assert (found.decoder_busy, found.score_busy) == (alone.decoder_busy, alone.score_busy)


def test_two_replicas_and_one_that_joined_by_hand():
    """F 1, B 2, own U-Net 4, none ahead.

    Alone, either replica: F0 0-1, S0 1-5, B0 5-7, F1 7-8, S1 8-12, B1 12-14. Through one that takes
    3 and is 1 away S0 would be back at 6, so it is not asked. One that takes 1 is: for a S0 2-3,
    back at 4, B0 4-6, F1 6-7, S1 8-9, B1 10-12; for b it would be back at 5 with S0, as its own is,
    which it takes: B0 5-7, F1 7-8, then S1 9-10, B1 11-13.
    """
    passes = [[1.0] * 2], [[2.0] * 2]
    own = Servers(1, 4.0, 0.0)
    idle = play_fleet(*passes, own, [Servers(1, 3.0, 1.0)], units=2)
    assert (idle.seconds, idle.score_busy, idle.busy) == (14.0, 8.0, (0.0,))
    asked = play_fleet(*passes, own, [Servers(1, 1.0, 1.0)], units=2)
    assert asked.seconds == 13.0
    assert asked.busy == (3.0,) and asked.score_busy == 2.0


def test_rows_that_are_split_are_awaited_together():
    """Two parts of 2 seconds: one to each rank of the job, or both to those that joined."""
    passes = [[1.0]], [[2.0]]
    assert play_fleet(*passes, Servers(2, 2.0, 0.0), [], units=1, parts=2).seconds == 5.0
    assert play_fleet(*passes, Servers(1, 2.0, 0.0), [], units=1, parts=2).seconds == 7.0
    joined = [Servers(2, 1.0, 0.25)]
    assert play_fleet(*passes, Servers(1, 2.0, 0.0), joined, units=1, parts=2).seconds == 4.5


# What joins


def test_counts_and_gpus_of_the_option(tmp_path):
    card = tmp_path / "card.yaml"
    card.write_text(SMALL_CARD)
    found = joined_ranks(f"64xl40s, 8xa100-40,2x{card}")
    assert [(one.count, one.gpu.name) for one in found] == [
        (64, "l40s-48"), (8, "a100-40"), (2, "card"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("64", "'64' is not COUNTxGPU"),
        ("l40s", "'l40s' is not COUNTxGPU"),
        ("0xl40s", "'0xl40s' is not COUNTxGPU"),
        ("-1xl40s", "a count of 1 or more"),
        ("1.5xl40s", "is not COUNTxGPU"),
        ("64x", "'64x' is not COUNTxGPU.*l40s-48"),
        ("64xl40s,", "'' is not COUNTxGPU"),
        ("64xa100", "'a100' is none of .*a100-40.*a100-80"),
        ("64xl41s", "'l41s' is none of .*l40s-48.* a YAML file with memory"),
        ("64xnowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_an_option_that_is_wrong_is_told_how(given, words):
    with pytest.raises(ConfigError, match=f"--score-ranks {given}: .*{words}"):
        joined_ranks(given)


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        ("toy_pretrain", ["--score-ranks", "4xl40s"], "stage=pretrain has no U-Net"),
        (
            "toy_instruct",
            ["--score-ranks", "4xl40s", "score.placement=colocated"],
            "set score.placement=dedicated, or add --search",
        ),
        (
            "instruct_256gpu",
            ["--score-ranks", "4xv100-32", "model.diffusion.path=null"],
            "v100-32 has no bf16 arithmetic; add training.precision=fp16",
        ),
    ],
)
def test_what_cannot_be_joined_ends_with_2_and_a_remedy(config, arguments, words, capsys):
    assert plan(config, 2, *arguments) == 2
    assert words in capsys.readouterr().err


# Plans


def test_a_plan_says_what_those_that_join_do_and_how_many_are_enough(tmp_path, capsys):
    found = tmp_path / "plan.json"
    given = ["--score-ranks", "2xl40s", *SHARED, "--json", str(found)]
    assert plan("toy_instruct", 4, *given) == 0
    output, planned = capsys.readouterr().out, json.loads(found.read_text())
    fleet, speed = planned["score_fleet"], planned["iteration"]["images_per_second"]
    (joined,) = fleet["joined"]
    assert (joined["gpu"], joined["count"], joined["fits"]) == ("l40s-48", 2, True)
    assert speed > 1.1 * fleet["images_per_second_without"]
    assert 0 < joined["share_of_requests"] < 1 and 0 < joined["idle"] < 1
    assert 3 * fleet["network_mb_s_a_replica"] == pytest.approx(2 * joined["network_mb_s"])
    enough = joined["enough"]
    assert f"{enough} x l40s-48 are enough" in output and "2 x l40s-48 answer" in output

    def speed_with(count: int) -> float:
        assert plan("toy_instruct", 4, f"--score-ranks={count}xl40s", *given[2:]) == 0
        capsys.readouterr()
        return json.loads(found.read_text())["iteration"]["images_per_second"]

    most = speed_with(100)
    assert speed_with(enough) == pytest.approx(joined["images_per_second_with_enough"])
    assert speed_with(enough) >= 0.99 * most
    assert enough == 1 or speed_with(enough - 1) < 0.99 * most


def test_a_search_takes_layouts_that_can_be_joined(tmp_path, capsys):
    found = tmp_path / "plan.json"
    given = ["--search", "--score-ranks", "4xl40s", "training.global_batch_size=96"]
    assert plan("toy_instruct", 4, *given, "--json", str(found)) == 0
    planned = json.loads(found.read_text())
    assert planned["layout"]["placement"] == "dedicated"
    placements = {one["placement"] for one in planned["search"]["candidates"]}
    assert placements == {"dedicated"} and planned["score_fleet"]["joined"]
    assert "4 x l40s-48 answer" in capsys.readouterr().out


def test_a_card_that_is_too_small_ends_with_1(tmp_path, capsys):
    card = tmp_path / "card.yaml"
    card.write_text(SMALL_CARD)
    assert plan("toy_instruct", 4, *SHARED, "--score-ranks", f"2x{card}") == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


# Against a simulation


def test_a_simulation_with_the_plan_s_times_is_as_fast_where_few_joined():
    """8 replicas at full size and one score rank of the job for them; a spread of a tenth. The more
    there is to choose from, the less good is what the program knows for its choice."""
    config = fleet_against_plan.shared_layout(8)
    shares = model_shares(config, whole_model(config))
    reached = []
    for count in (2, 8):
        joined = joined_ranks(f"{count}xl40s")
        found = fleet_against_plan.compare(config, GPUS["h100-80"], joined, shares, updates=3)
        reached.append(found.spread / found.planned)
    assert reached[0] == pytest.approx(1, abs=fleet_against_plan.AGREES)
    assert 0.6 < reached[1] < 1.02


def test_the_documents_say_what_was_compared():
    documents = Path(__file__).parents[2] / "docs" / "score_ranks.md"
    assert "python -m benchmarks.fleet_against_plan" in documents.read_text()
