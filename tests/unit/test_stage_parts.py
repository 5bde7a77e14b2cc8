"""What stages load and draw, without training them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CLIPTextModel

from megatron_kosmosg.parallel.context import single_process_context
from megatron_kosmosg.stages import build_stage, stage_facts
from megatron_kosmosg.stages.align import load_text_encoder
from megatron_kosmosg.stages.instruct import InstructStage
from megatron_kosmosg.training.stage import Probe
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.float16), ("fp16", torch.float16)],
)
def test_the_text_encoders_dtype_is_not_that_of_its_files(tmp_path, precision, dtype):
    folder = write_stable_diffusion(tmp_path) / "text_encoder"
    CLIPTextModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    config = tiny_config("align", tmp_path, tmp_path / "out")
    config = replace_section(config, "training", precision=precision)
    assert load_text_encoder(config, single_process_context("cpu")).dtype == dtype


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("pretrain", ("embedding", "decoder", "resampler")),
        ("align", ("aligner_m", "aligner_n")),
        ("instruct", ("embedding", "decoder", "resampler", "aligner_m")),
    ],
)
def test_what_trains(stage: str, parts: tuple[str, ...], tmp_path) -> None:
    """Whole parts, and in pretrain and instruct the tower's last block and post-norm."""
    config = tiny_config(stage, tmp_path, tmp_path)
    lone = single_process_context("meta")
    # A stage object of another pipeline rank loads no frozen helper.
    stage_object = build_stage(config, dataclasses.replace(lone, pp_size=2))
    (model,) = stage_object.build_model(lone)
    assert stage_object.name == stage_facts(stage).name == stage
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tower = "vision_encoder.tower."
    trained_tower = (f"{tower}encoder.layers.2.", f"{tower}post_layernorm.")
    expected = tuple(f"{part}." for part in parts) + (trained_tower if stage != "align" else ())
    assert [part for part in ("M", "N") if getattr(model, f"aligner_{part.lower()}")] == list(
        {"pretrain": "", "align": "MN", "instruct": "M"}[stage]
    )
    assert (model.output_layer is not None) == (stage == "pretrain")
    names = {name for name, _ in model.named_parameters()}
    assert trained == {name for name in names if name.startswith(expected)}
    assert {name.split(".")[0] for name in trained} >= set(parts)
    if stage != "align":
        assert len([name for name in trained if name.startswith(tower)]) == 18


def test_a_run_without_held_out_data_draws_no_images(tmp_path):
    """Every run probes at its end, also one of a config that names no held-out data."""
    config = tiny_config("instruct", write_stable_diffusion(tmp_path), tmp_path / "out")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout={}))
    assert InstructStage(config, single_process_context("cpu")).probe([], 1) == Probe()
