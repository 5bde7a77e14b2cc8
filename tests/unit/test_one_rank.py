"""A run of any layout can be loaded by one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import single_process_config
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.stages import stage_facts

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*_256gpu.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_the_layout_is_that_of_one_rank_and_the_model_the_same(file):
    config = load_config(file, ["training.micro_batch_size=8"])
    with pytest.raises(ConfigError):
        validate_layout(config, 1, stage_facts(config.stage))
    whole = single_process_config(config)
    validate_layout(whole, 1, stage_facts(whole.stage))
    assert whole.model == config.model and whole.data == config.data
    same = dataclasses.replace(whole.score, placement=config.score.placement)
    assert same == config.score
