"""Training asks for CUDA where the list of this release of Megatron-Core says, and nowhere else."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from tests.support import shim_sites

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the shim is for machines without a GPU"
)


@pytest.fixture
def listed() -> list[str]:
    return json.loads(shim_sites.SITES.read_text())[version("megatron-core")]


@pytest.mark.parametrize(("stage", "name"), [("pretrain", "pipeline"), ("instruct", "data")])
def test_no_site_is_new(stage, name, listed, tmp_path):
    found = shim_sites.record_row(stage, name, tmp_path)
    assert len(found) > 10 and not found - set(listed)


@pytest.mark.slow
def test_the_sites_of_all_stages_are_those_of_the_list(listed, tmp_path):
    found = set()
    for stage, name in shim_sites.rows():
        found |= shim_sites.record_row(stage, name, tmp_path)
    assert sorted(found) == listed
