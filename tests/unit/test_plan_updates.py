"""Kernels of an optimizer's step, planned and as the documents' rehearsals counted them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.planning.communication import bucket_elements
from megatron_kosmosg.planning.launches import update_launches
from megatron_kosmosg.planning.model_counts import model_shares, whole_model

SCALING = Path(__file__).parents[2] / "docs" / "scaling.md"
REHEARSED = {
    name: int(kernels.replace(",", ""))
    for name, kernels in re.findall(
        r"^\| (\w+gpu), decoder \| [\d,]+ \| ([\d,]+) \|", SCALING.read_text(), re.MULTILINE
    )
}


def test_every_shipped_config_with_one_kind_of_decoder_rank_is_there():
    assert {"pretrain_256gpu", "instruct_8gpu", "instruct_256gpu"} <= REHEARSED.keys()


@pytest.mark.parametrize("name", REHEARSED)
def test_an_update_launches_what_was_rehearsed(name):
    """With 1 to 256 replicas, within a seventh and thirteen."""
    config = load_config(name, ["model.diffusion.path=null"])
    world = rank_grid(config, config.parallel.world_size)
    shares = model_shares(config, whole_model(config))
    (spec,), (held,) = shares.specs, shares.counts
    planned = update_launches(config, world, spec, held.gradient_elements)
    assert planned == pytest.approx(REHEARSED[name], rel=1 / 7, abs=13)


def test_buckets_are_megatron_cores():
    """At least 40 million elements, a million for every replica; one where nothing is split."""
    config = load_config("instruct_256gpu", ["score.placement=colocated"])
    for ranks, expected in ((8, 40e6), (256, 256e6)):
        world = rank_grid(config, ranks)
        assert bucket_elements(config, world, 1e9, is_first=True) == expected
        assert bucket_elements(config, world, 1e7, is_first=True) == 1e7
        assert bucket_elements(config, world, 1e9, is_first=False) == 1e9
    alone = load_config("instruct_256gpu", ["parallel.overlap_grad_reduce=false"])
    assert bucket_elements(alone, world, 1e9, is_first=True) == 1e9
