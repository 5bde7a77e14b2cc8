"""Decoder ranks work on while score ranks do: proven from the trace that a run leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_kosmosg.config.paths import trace_file
from megatron_kosmosg.training.metrics import METRICS_FILE
from tests.support.ranks import run_ranks
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion
from tests.support.trace_case import Pause, offset_of_wrong_clock, tiny_run

MICRO_BATCHES, ROWS = 4, 8
TRACED = 2
PAUSE = Pause(forward=0.2, unet=0.2)
"""Longer than a rank is likely to be kept from a core of a busy machine."""
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder*2|decoder*1,M"}


@dataclass(frozen=True)
class Stretch:
    """In microseconds from the begin of the iteration."""

    begin: float
    end: float

    def overlap(self, other: Stretch) -> float:
        return min(self.end, other.end) - max(self.begin, other.begin)


class Trace:
    """trace.json by the format's documentation."""

    def __init__(self, file: Path) -> None:
        self.events = json.loads(file.read_text())["traceEvents"]
        self.complete = [event for event in self.events if event["ph"] == "X"]
        self.names = {
            event["pid"]: event["args"]["name"]
            for event in self.events
            if event["name"] == "process_name"
        }

    def of(self, rank: int, what: str) -> list[Stretch]:
        """By micro-batch, from 0 on."""
        found = {
            event["args"]["micro_batch"]: Stretch(event["ts"], event["ts"] + event["dur"])
            for event in self.complete
            if event["pid"] == rank and event["cat"] == what
        }
        assert sorted(found) == list(range(MICRO_BATCHES)), (rank, what, sorted(found))
        return [found[number] for number in range(MICRO_BATCHES)]

    def named(self, rank: int, what: str) -> list[Stretch]:
        return [
            Stretch(event["ts"], event["ts"] + event["dur"])
            for event in self.complete
            if event["pid"] == rank and event["cat"] == what
        ]


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


def trace(stable_diffusion, folder, num_ranks, window, parallel) -> Trace:
    """Of the second of three iterations of a run with one score rank, the last."""
    config = tiny_config("instruct", stable_diffusion, folder, **parallel)
    config = replace_section(config, "score", placement="dedicated", window=window)
    samples = ROWS * MICRO_BATCHES
    config = replace_section(
        config, "training", train_iters=3, global_batch_size=samples, micro_batch_size=ROWS
    )
    config = replace_section(config, "optimizer", lr_warmup_iters=1)
    config = replace_section(config, "logging", trace_iteration=TRACED, tensorboard=False)
    run_ranks(num_ranks, tiny_run, config, PAUSE)
    return Trace(trace_file(config))


def test_the_decoder_runs_ahead_of_the_score_rank(stable_diffusion, tmp_path):
    got = trace(stable_diffusion, tmp_path, 2, 2, {})
    send, wait = got.of(0, "send condition"), got.of(0, "wait for answer")
    forward, unet = got.of(0, "forward"), got.of(1, "U-Net")
    for number in range(MICRO_BATCHES - 1):
        assert send[number + 1].end < wait[number].end
    assert any(overlaps(unet, forward))
    check_order(send, unet, wait)
    check_images_ahead(got, send, wait, steady=MICRO_BATCHES - 1)
    check_contents(got, tmp_path)


def test_a_window_of_one_has_nothing_run_ahead(stable_diffusion, tmp_path):
    got = trace(stable_diffusion, tmp_path, 2, 1, {})
    send, wait = got.of(0, "send condition"), got.of(0, "wait for answer")
    forward, unet = got.of(0, "forward"), got.of(1, "U-Net")
    for number in range(MICRO_BATCHES - 1):
        assert send[number + 1].begin > wait[number].end
    assert not any(overlaps(unet, forward))
    check_order(send, unet, wait)
    check_images_ahead(got, send, wait, steady=MICRO_BATCHES)


def test_two_pipeline_stages_and_the_score_rank_work_at_once(stable_diffusion, tmp_path):
    got = trace(stable_diffusion, tmp_path, 3, 2, PP2)
    send, wait = got.of(1, "send condition"), got.of(1, "wait for answer")
    unet = got.of(2, "U-Net")
    for number in range(MICRO_BATCHES - 1):
        assert send[number + 1].end < wait[number].end
    assert any(overlaps(unet, got.of(1, "forward")))
    check_order(send, unet, wait)
    assert got.named(1, "forward-recv") and got.named(0, "forward-send")  # Megatron's names
    assert got.named(0, "images ahead") and not got.named(1, "images ahead")
    for sent, received in zip(
        got.named(0, "forward-send"), got.named(1, "forward-recv"), strict=True
    ):
        assert sent.begin < received.end


def overlaps(unet, forward):
    """Of each i: whether the U-Net worked on it during the forward pass of i + 1."""
    return [work.overlap(next_pass) > 0 for work, next_pass in zip(unet, forward[1:], strict=False)]


def check_order(send, unet, wait):
    """One clock for all ranks: a message arrives after it was sent."""
    for number in range(MICRO_BATCHES):
        assert send[number].begin < unet[number].begin
        assert unet[number].end < wait[number].end


def check_images_ahead(got: Trace, send, wait, steady: int):
    """Each pass with one behind it has the next images on their way before it waits; the last one,
    those of the next update."""
    ahead = got.named(0, "images ahead")
    assert len(ahead) == steady
    for number, stretch in enumerate(ahead, start=MICRO_BATCHES - steady):
        assert send[number].end < stretch.begin
        assert stretch.end < wait[number - (MICRO_BATCHES - steady)].begin


def check_contents(got: Trace, folder: Path):
    """What a person looks for is there, inside the iteration, and agrees with the metrics."""
    assert got.names == {
        0: "rank 0: decoder replica 0, pipeline stage 0, tensor 0",
        1: "rank 1: score rank 0 of replica 0",
    }
    (iteration,) = got.named(0, "iteration")
    for event in got.complete:
        assert iteration.begin <= event["ts"] <= event["ts"] + event["dur"] <= iteration.end + 1
    assert len(got.named(0, "wait for data")) == MICRO_BATCHES
    assert got.named(0, "optimizer-inner-step") and got.named(1, "idle")
    for forward, backward in zip(got.of(0, "forward"), got.of(0, "backward"), strict=True):
        assert forward.end <= backward.begin
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    (record,) = [line for line in lines if line["iteration"] == TRACED and "lr" in line]
    waited = sum(stretch.end - stretch.begin for stretch in got.of(0, "wait for answer"))
    seconds = ROWS * MICRO_BATCHES / record["samples_per_sec"]
    assert waited / 1e6 / seconds == pytest.approx(record["decoder_idle"], abs=0.05)
    # A condition or gradient is 8 x 7 x 24 numbers of 4 bytes; headers come on top.
    payload = 2 * MICRO_BATCHES * ROWS * 7 * 24 * 4 / 2**20
    assert payload < record["link_mib"] < 1.1 * payload
    assert 0 < record["score_idle"] <= 1


def test_a_node_whose_clock_is_ahead_is_put_right():
    own, other = run_ranks(2, offset_of_wrong_clock, 5.0)
    assert own == 0.0
    # Half of the quickest round trip, which is less than a second however busy the machine is.
    assert other == pytest.approx(-5.0, abs=0.5)
