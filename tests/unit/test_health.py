"""Nodes that are not fit are named; the rank that holds the others up is, too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_kosmosg.monitoring.bandwidth import slow_nodes
from megatron_kosmosg.monitoring.node_health import (
    count_problems,
    disk_problems,
    ecc_problems,
    gpu_problems,
    link_problems,
)
from megatron_kosmosg.monitoring.stall_detector import Heartbeat, StallDetector
from megatron_kosmosg.monitoring.stragglers import straggler_metrics

LINKS = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
"""


def test_missing_gpus_and_memory_errors_are_named():
    counters = "0, 0\n1, 3\n2, [N/A]\n"
    assert count_problems(counters, 3) == []
    assert count_problems(counters, 8) == ["8 GPUs promised, 3 answer"]
    (problem,) = ecc_problems(counters)
    assert "GPU 1" in problem and "3 uncorrected" in problem


def test_dead_links_are_named_and_cards_without_links_are_fit():
    assert link_problems(LINKS) == ["GPU 1 has 1 live NVLinks, others have 2"]
    assert link_problems(LINKS.replace("<inactive>", "26.562 GB/s")) == []
    assert link_problems("GPU 0: NVIDIA T4 (UUID: x)\n") == [] and link_problems("") == []


def fake_smi(tmp_path, body: str) -> str:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('case $1 in nvlink) exit 1;; *) printf "0, 0\\n1, 0\\n";; esac', None),
        ("exit 9", "exit code 9"),
        ('printf "0, 0\\n"', "1 answer"),
    ],
    ids=["fit", "fails", "one-missing"],
)
def test_what_nvidia_smi_says_decides(tmp_path, body, words):
    problems = gpu_problems(2, fake_smi(tmp_path, body))
    if words is None:
        assert problems == []
    else:
        assert len(problems) == 1 and words in problems[0]


def test_without_nvidia_smi_promised_gpus_are_missing_and_none_are_not():
    assert gpu_problems(0, "/no/such/program") == []
    (problem,) = gpu_problems(8, "/no/such/program")
    assert "8 GPUs promised" in problem


def test_disk(tmp_path):
    assert disk_problems(tmp_path / "not" / "yet", 0) == []
    (problem,) = disk_problems(tmp_path, 1e9)
    assert str(tmp_path) in problem and "1e+09 are needed" in problem


def test_slow_nodes_are_compared_with_the_median():
    assert slow_nodes({"n1": 100.0, "n2": 40.0, "n3": 110.0}, 0.5) == {"n2": 0.4}
    assert slow_nodes({"n1": 100.0, "n2": 40.0, "n3": 110.0}, 0.0) == {}
    assert slow_nodes({}, 0.5) == {}


def test_the_slowest_rank_is_a_multiple_of_the_median():
    assert straggler_metrics({0: 1.0, 1: 1.1, 3: 3.3, 4: 1.2}) == {
        "slowest_rank": 3,
        "slowest_rank_ratio": pytest.approx(3.0),
        "median_rank_seconds": 1.1,
    }


def heartbeat(
    rank: int, number: int, seconds: float, *, waits: bool, phase: str = "training"
) -> Heartbeat:
    return Heartbeat(rank, f"n{rank}", number, 7, phase, seconds, f"training/x.py:{rank}", waits)


def test_a_rank_that_does_not_wait_holds_the_others_up():
    detector = StallDetector(range(3), stall_seconds=10)
    fine = {rank: heartbeat(rank, 1, 2.0, waits=True) for rank in range(3)}
    assert detector.report(fine, 0.0) is None
    stuck = {rank: heartbeat(rank, 2, 11.0, waits=rank != 1) for rank in range(3)}
    output = detector.report(stuck, 9.0)
    assert "rank 1 on n1" in output and "training/x.py:1" in output and "rank 0" not in output
    again = {rank: heartbeat(rank, 3, 14.0, waits=rank != 1) for rank in range(3)}
    assert detector.report(again, 12.0) is None  # the same stall is said once
    assert detector.stall == output  # and lasts
    moving = {rank: heartbeat(rank, 4, 0.5, waits=True) for rank in range(3)}
    assert detector.report(moving, 15.0) is None
    assert detector.stall is None
    stuck = {rank: heartbeat(rank, 5, 12.0, waits=rank != 2) for rank in range(3)}
    assert "rank 2" in detector.report(stuck, 16.0)


def test_a_rank_that_works_alone_for_long_is_no_stall_while_others_move():
    detector = StallDetector(range(2), stall_seconds=10)
    heartbeats = {0: heartbeat(0, 1, 50.0, waits=False), 1: heartbeat(1, 1, 1.0, waits=False)}
    assert detector.report(heartbeats, 0.0) is None


def test_a_silent_rank_is_named_with_its_last_words():
    detector = StallDetector(range(2), stall_seconds=10)
    for second in range(0, 10, 2):
        heartbeats = {
            0: heartbeat(0, second, 1.0, waits=True),
            1: heartbeat(1, 0, 1.0, waits=False),
        }
        assert detector.report(heartbeats, float(second)) is None
    output = detector.report(
        {0: heartbeat(0, 99, 9.0, waits=True), 1: heartbeat(1, 0, 1.0, waits=False)}, 11.0
    )
    assert "no sign of life from rank 1 on n1" in output and "training/x.py:1" in output


def test_a_score_rank_that_is_gone_is_no_stall_and_hides_none():
    detector = StallDetector(range(3), stall_seconds=10)
    last_words = replace(heartbeat(2, 1, 1.0, waits=False, phase="scoring"), may_go=True)
    for second in range(0, 40, 2):
        heartbeats = {rank: heartbeat(rank, second, 1.0, waits=True) for rank in range(2)}
        assert detector.report({**heartbeats, 2: last_words}, float(second)) is None
    stuck = {rank: heartbeat(rank, 99, 11.0, waits=rank == 0) for rank in range(2)}
    output = detector.report({**stuck, 2: last_words}, 42.0)
    assert "held up by rank 1 on n1" in output and "rank 2" not in output


def test_a_rank_that_never_spoke_is_named_when_the_others_stall():
    detector = StallDetector(range(2), stall_seconds=10)
    assert detector.report({0: heartbeat(0, 1, 0.0, waits=True), 1: None}, 0.0) is None
    assert detector.report({0: heartbeat(0, 2, 1.0, waits=True), 1: None}, 11.0) is None
    assert "rank 1 (30 s)" in detector.report({0: heartbeat(0, 3, 20.0, waits=True), 1: None}, 30.0)
