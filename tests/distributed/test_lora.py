"""Adapters on every layout against one rank, resumed on another, merged, and for PEFT."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.schema import LoraConfig, RunConfig
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.checkpoint_writer import write_checkpoint
from megatron_kosmosg.conversion.export_hf import export_hf
from megatron_kosmosg.conversion.export_lora import export_lora
from megatron_kosmosg.conversion.exported_models import load_aligner, load_mllm
from megatron_kosmosg.conversion.tensors import InMemory
from megatron_kosmosg.conversion.verify import verify
from megatron_kosmosg.models.lora import ADAPTERS
from megatron_kosmosg.stages import stage_facts
from tests.support.conversion_models import conversion_config, random_weights
from tests.support.ranks import run_ranks
from tests.support.run_case import BOUNDS, records, run_stage
from tests.support.shares import whole
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion

ITERATIONS = 6
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder*2|decoder*1,M"}
LAYOUTS = {
    "tp2": (2, TP2, "none"),
    "tp2_sp_full": (2, TP2 | {"sequence_parallel": True}, "full"),
    "pp2_full": (2, PP2, "full"),
    "tp2_pp2_sp": (4, TP2 | PP2 | {"sequence_parallel": True}, "none"),
}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


def config_of(
    stable_diffusion: Path, output_dir: Path, parallel: dict, recompute: str, iterations: int
) -> RunConfig:
    config = tiny_config("instruct", stable_diffusion, output_dir, **parallel)
    config = replace_section(
        config, "training", train_iters=iterations, recompute=recompute, eval_iters=1
    )
    config = replace_section(
        config,
        "optimizer",
        lr=1e-2,
        lr_warmup_iters=1,
        lr_decay_iters=99,
        lr_decay_style="constant",
    )
    config = dataclasses.replace(config, lora=LoraConfig(rank=3, alpha=6.0))
    return replace_section(config, "logging", tensorboard=False)


def train(stable_diffusion, folder, ranks, parallel, recompute="none", iterations=ITERATIONS):
    """(losses, parameters before, parameters after) of a run, whole."""
    config = config_of(stable_diffusion, folder, parallel, recompute, iterations)
    ran = run_ranks(ranks, run_stage, config)
    losses = [line["loss"] for line in records(config) if "loss" in line]
    before, after = (
        whole([getattr(rank, name) for rank in ran], tolerance=1e-6) for name in ("before", "after")
    )
    return losses, before, after


@pytest.fixture(scope="module")
def single_process(stable_diffusion, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, *train(stable_diffusion, folder, 1, {})


def apart(found: dict, expected: dict, start: dict) -> float:
    """|found - expected| / |expected - start| over the whole model."""
    off = sum(np.square(found[name] - value).sum() for name, value in expected.items())
    way = sum(np.square(start[name] - value).sum() for name, value in expected.items())
    return float(np.sqrt(off / way))


def test_adapters_and_the_aligner_train_and_nothing_else(single_process):
    _, losses, before, after = single_process
    moved = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    adapters = {name for name in before if name.endswith(ADAPTERS)}
    assert len(adapters) == 3 * 4 * 2
    assert adapters <= moved
    assert all(name in adapters or name.startswith("aligner_m.") for name in moved)
    assert len(losses) == ITERATIONS


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_learns_what_one_rank_does(name, single_process, stable_diffusion, tmp_path):
    ranks, parallel, recompute = LAYOUTS[name]
    losses, before, after = train(stable_diffusion, tmp_path, ranks, parallel, recompute)
    _, expected_losses, start, end = single_process
    assert all(np.array_equal(before[each], value) for each, value in start.items())
    assert losses == pytest.approx(expected_losses, rel=BOUNDS["fp32"].loss)
    assert apart(after, end, start) <= BOUNDS["fp32"].update


def test_a_run_goes_on_exactly_and_on_another_layout(single_process, stable_diffusion, tmp_path):
    _, expected_losses, start, end = single_process
    half = ITERATIONS // 2
    train(stable_diffusion, tmp_path / "same", 1, {}, iterations=half)
    losses, _, after = train(stable_diffusion, tmp_path / "same", 1, {})
    assert losses == expected_losses
    assert all(np.array_equal(after[name], value) for name, value in end.items())
    train(stable_diffusion, tmp_path / "other", 2, TP2, iterations=half)
    losses, _, after = train(stable_diffusion, tmp_path / "other", 2, PP2)
    assert losses == pytest.approx(expected_losses, rel=BOUNDS["fp32"].loss)
    assert apart(after, end, start) <= BOUNDS["fp32"].update


def test_a_trained_checkpoint_reads_as_the_merged_weights(single_process):
    folder, _, _, after = single_process
    source = CheckpointTensors(folder)
    assert not [name for name in source.names() if name.endswith(ADAPTERS)]
    for module in source.adapted():
        a, b = (after[f"{module}.{leaf}"] for leaf in ("lora_a", "lora_b"))
        expected = after[f"{module}.weight"] + 6.0 / 3 * (b @ a)
        np.testing.assert_allclose(source.read(f"{module}.weight").numpy(), expected, atol=1e-6)


# Exports, of random weights in which adapters are no small part


@pytest.fixture(scope="module")
def exported(stable_diffusion, tmp_path_factory) -> Path:
    """A folder with the run of adapters, the run of the same weights without, and their exports."""
    folder = tmp_path_factory.mktemp("exported")
    bare = conversion_config("instruct", folder)
    config = dataclasses.replace(bare, lora=LoraConfig(rank=3, alpha=6.0))
    weights = random_weights(config)
    write_checkpoint(folder / "run", config, InMemory(weights))
    base = {name: value for name, value in weights.items() if not name.endswith(ADAPTERS)}
    write_checkpoint(folder / "base", bare, InMemory(base))
    export_hf(folder / "run", stable_diffusion, folder / "merged")
    export_hf(folder / "base", stable_diffusion, folder / "plain")
    export_lora(folder / "run", folder / "lora")
    return folder


def test_the_merged_export_is_the_model_with_its_adapters(exported):
    found = verify(exported / "run", exported / "merged")
    assert {"hidden", "condition"} <= {each.name for each in found}
    assert all(each.relative <= 1e-5 for each in found), found


@torch.no_grad()
def test_stock_peft_gives_the_condition_of_the_merged_export(exported):
    merged = load_mllm(exported / "merged" / "mllm", torch.float32)
    plain = load_mllm(exported / "plain" / "mllm", torch.float32)
    aligner = load_aligner(exported / "merged" / "aligner", torch.float32)
    tokens = torch.randint(5, 300, (2, 11), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = 0
    mask = torch.zeros(tokens.shape, dtype=torch.bool)

    def condition(mllm) -> torch.Tensor:
        return aligner(mllm.text_model.model(tokens).last_hidden_state, mask)

    wanted, without = condition(merged), condition(plain)
    adapted = PeftModel.from_pretrained(plain, exported / "lora").eval()
    found = condition(adapted.base_model.model)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (without - wanted).abs().max() > 1e-2 * wanted.abs().max()


def test_what_adapters_cannot_carry_is_not_exported_as_them(exported, tmp_path):
    with pytest.raises(ConversionError, match=r"without adapters \(lora\.rank=0\)"):
        export_lora(exported / "base", tmp_path / "lora")
    config = conversion_config("instruct", tmp_path)
    lora = LoraConfig(rank=3, trains=["aligner_m", "resampler"])
    config = dataclasses.replace(config, lora=lora)
    write_checkpoint(tmp_path / "run", config, InMemory(random_weights(config)))
    with pytest.raises(ConversionError, match="also trained resampler of the language model"):
        export_lora(tmp_path / "run", tmp_path / "lora")


@pytest.mark.parametrize(
    ("stage", "lora", "message"),
    [
        ("align", LoraConfig(rank=4), "means nothing to stage=align"),
        ("instruct", LoraConfig(rank=-1), "must be 0 "),
        ("instruct", LoraConfig(rank=4, alpha=0.0), "lora.alpha=0: .* alpha above 0"),
        ("instruct", LoraConfig(rank=4, trains=["decoder"]), "lora.trains names decoder"),
    ],
)
def test_settings_that_cannot_work(stage, lora, message, tmp_path):
    config = dataclasses.replace(tiny_config(stage, tmp_path, tmp_path), lora=lora)
    with pytest.raises(ConfigError, match=message):
        validate_layout(config, 1, stage_facts(stage))
