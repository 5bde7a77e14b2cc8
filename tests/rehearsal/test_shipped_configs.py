"""Every shipped config makes its updates: small ones as shipped, large ones with tiny models."""

from __future__ import annotations

import pytest

from megatron_kosmosg.config.input_paths import shipped_configs
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.rehearsal.rehearsal_report import failure

LARGE = tuple(name for name in shipped_configs() if name.endswith("gpu"))
"""Of the paper's sizes, which other tests rehearse; here it is about their other settings."""


@pytest.mark.parametrize("name", shipped_configs())
def test_every_kind_of_rank_of_a_shipped_config_makes_its_update(rehearse, name):
    """The small ones with the frozen models of their own folders, which are here."""
    report = rehearse.shipped(name, num_gpus=num_gpus(name), with_tiny_models=name in LARGE)
    assert [failure(kind) for kind in report["kinds"]] == [None] * len(report["kinds"])
    assert [note for note in report["notes"] if "Stable Diffusion" in note] == []


def num_gpus(name: str) -> int:
    """Those of the config, or as many as make one replica."""
    parallel = load_config(name, []).parallel
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return parallel.world_size or replica


def test_some_configs_are_large_and_some_have_latents_of_their_own():
    assert len(LARGE) >= 8 and {"toy_instruct", "debug_instruct"} <= set(shipped_configs())
