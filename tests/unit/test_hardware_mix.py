"""Which kinds of hardware answered the requests of an interval: counts, names and what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed import HashStore

from megatron_kosmosg.parallel.context import single_process_context
from megatron_kosmosg.score import connect
from megatron_kosmosg.score.hardware_mix import HardwareMix
from tests.support.tiny_models import replace_section, tiny_config

H100, L40S = "NVIDIA H100 80GB HBM3, torch 2.9.1+cu128, bf16", "NVIDIA L40S, torch 2.9.1, bf16"
TRACKED = "score_answers/NVIDIA H100 80GB HBM3 torch 2.9.1-cu128 bf16"


def test_answers_of_all_replicas_are_counted_by_interval_and_kind():
    config = tiny_config("instruct", Path(), Path())
    config = replace_section(config, "logging", log_interval=10)
    config = replace_section(config, "training", train_iters=25)
    alone = single_process_context(torch.device("cpu"))
    context = replace(alone, dp_size=2, num_score_ranks=3, store=HashStore())
    store = connect._store(context.store, config)
    mix = HardwareMix(config, context)

    def told(*answered: dict[str, int]) -> None:
        for replica, counts in enumerate(answered):
            store.set(f"answered {replica}", json.dumps(counts))

    told({H100: 20}, {H100: 20})
    assert mix.report(9) == {}
    first = mix.report(10)
    assert first == {TRACKED: 40.0} and mix.news(first) is None, "one kind is nothing new"
    told({H100: 35, L40S: 5}, {H100: 40})
    second = mix.report(20)
    assert second == {TRACKED: 35.0, "score_answers/NVIDIA L40S torch 2.9.1 bf16": 5.0}
    said = mix.news(second)
    assert said is not None and "round differently: 35 (88%) from NVIDIA H100" in said
    assert said.endswith(", 5 (12%) from NVIDIA L40S torch 2.9.1 bf16")
    told({H100: 45, L40S: 10}, {H100: 50})
    last = mix.report(25)
    assert last[TRACKED] == 20.0 and mix.news(last) is None, "it was said before"


def test_without_score_ranks_there_is_nothing_to_count():
    config = tiny_config("instruct", Path(), Path())
    mix = HardwareMix(config, single_process_context(torch.device("cpu")))
    assert mix.report(config.training.train_iters) == {}
