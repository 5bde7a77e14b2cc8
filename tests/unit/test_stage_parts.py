"""What stages load and draw, without training them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CLIPTextModel

from megatron_kosmosg.parallel.layout import lone_layout
from megatron_kosmosg.stages.align import load_text_encoder
from megatron_kosmosg.stages.instruct import InstructStage
from megatron_kosmosg.training.stage import Probe
from tests.tiny_models import replace_section, tiny_config, write_stable_diffusion


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.float16), ("fp16", torch.float16)],
)
def test_the_text_encoders_dtype_is_not_that_of_its_files(tmp_path, precision, dtype):
    folder = write_stable_diffusion(tmp_path) / "text_encoder"
    CLIPTextModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    config = tiny_config("align", tmp_path, tmp_path / "out")
    config = replace_section(config, "training", precision=precision)
    assert load_text_encoder(config, lone_layout("cpu")).dtype == dtype


def test_a_run_without_held_out_data_draws_no_pictures(tmp_path):
    """Every run probes at its end, also one of a config that names no held-out data."""
    config = tiny_config("instruct", write_stable_diffusion(tmp_path), tmp_path / "out")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout={}))
    assert InstructStage(config, lone_layout("cpu")).probe([], 1) == Probe()
