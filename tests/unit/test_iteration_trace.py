"""What a trace of an iteration is made of: stretches, their numbers, the file's events."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import LoggingConfig, RunConfig, TrainingConfig
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.monitoring.iteration_trace import chrome_trace
from megatron_kosmosg.monitoring.spans import MegatronTimers, Spans
from megatron_kosmosg.monitoring.trace_exchange import TracePart
from megatron_kosmosg.stages.facts import PRETRAIN


def test_stretches_nest_and_carry_what_they_are_about():
    spans, before = Spans(torch.device("cpu")), time.time()
    with spans("outer"):
        with spans("inner", sample=torch.tensor([7, 3, 5])):
            time.sleep(0.002)
        unfinished = spans.begin("unfinished")
    outer, inner = spans.finished()
    assert (outer.name, inner.name, inner.about) == ("outer", "inner", {"sample": 3})
    assert before <= outer.start <= inner.start < inner.end <= outer.end <= time.time()
    assert inner.end - inner.start >= 0.002 and not unfinished.end
    spans.clear()
    assert spans.finished() == []


def test_waiting_for_items_is_a_stretch_each():
    spans = Spans(torch.device("cpu"))
    assert list(spans.over(iter("ab"), "data")) == ["a", "b"]
    assert [span.name for span in spans.finished()][:2] == ["data", "data"]


def test_timers_of_megatron_number_the_passes():
    spans = Spans(torch.device("cpu"))
    timers = MegatronTimers(spans)
    for name in ("forward-compute", "forward-compute", "forward-send", "backward-compute"):
        timers(name, log_level=2).start(barrier=True)  # nobody else is there to wait for
        timers(name).stop()
    assert [(span.name, span.about) for span in spans.finished()] == [
        ("forward", {"micro_batch": 0}),
        ("forward", {"micro_batch": 1}),
        ("forward-send", {}),
        ("backward", {"micro_batch": 0}),
    ]


def stretch(name, start, end, lane="program", **about):
    return {"name": name, "about": about, "lane": lane, "start": start, "end": end}


def test_file_is_cut_to_the_iteration_and_names_micro_batches_of_score_ranks():
    decoder = [
        stretch("iteration", 100.0, 101.0, number=4),
        stretch("send condition", 100.1, 100.2, micro_batch=3, sample=40),
        stretch("wait for answer", 100.2, 100.9, micro_batch=3, sample=40),
    ]
    score = [
        stretch("U-Net", 98.0, 99.0, sample=8),  # of the iteration before
        stretch("idle", 99.0, 100.25),
        stretch("U-Net", 100.25, 100.8, sample=40),
        stretch("U-Net", 100.3, 100.85, lane="GPU", sample=40),
        stretch("idle", 100.8, 105.0),
    ]
    trace = chrome_trace(
        {0: TracePart("rank 0: decoder", decoder), 1: TracePart("rank 1: score", score)}
    )
    shown = [
        (e["pid"], e["tid"], e["name"], round(e["ts"] / 1e6, 6), round(e["dur"] / 1e6, 6))
        for e in trace["traceEvents"]
        if e["ph"] == "X"
    ]
    assert shown == [
        (0, 0, "iteration 4", 0.0, 1.0),
        (0, 0, "send condition 3", 0.1, 0.1),
        (0, 0, "wait for answer 3", 0.2, 0.7),
        (1, 0, "idle", 0.0, 0.25),
        (1, 0, "U-Net 3", 0.25, 0.55),
        (1, 1, "U-Net 3", 0.3, 0.55),
        (1, 0, "idle", 0.8, 0.2),
    ]
    arrows = [e for e in trace["traceEvents"] if e["ph"] in "stf"]
    assert [(e["ph"], e["pid"], e["id"]) for e in arrows] == [
        ("s", 0, 40), ("f", 0, 40), ("t", 1, 40)
    ]  # fmt: skip
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"]
             if e["name"] == "thread_name"}  # fmt: skip
    assert lanes == {(0, 0): "program", (1, 0): "program", (1, 1): "GPU"}


@pytest.mark.parametrize("iteration", [0, 5])
def test_an_iteration_that_nothing_follows_is_refused(iteration):
    config = RunConfig(
        stage="pretrain",
        training=TrainingConfig(train_iters=5),
        logging=LoggingConfig(output_dir="x", trace_iteration=iteration),
    )
    with pytest.raises(ConfigError, match=r"logging.trace_iteration=\d must lie between 1 and 4"):
        validate_layout(config, 1, PRETRAIN)
    fine = dataclasses.replace(config.logging, trace_iteration=4)
    with pytest.raises(ConfigError) as other:  # of another setting: this one is fine
        validate_layout(dataclasses.replace(config, logging=fine), 1, PRETRAIN)
    assert "trace_iteration" not in str(other.value)
