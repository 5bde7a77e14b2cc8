"""The average of the weights: what it is, on every layout, resumed, exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_kosmosg.cli.convert_checkpoint import main as convert
from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.schema import LoraConfig, RunConfig
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.export_hf import export_hf
from megatron_kosmosg.conversion.export_lora import export_lora
from megatron_kosmosg.conversion.import_hf import import_hf
from megatron_kosmosg.stages import stage_facts
from tests.support.conversion_models import conversion_config
from tests.support.ranks import run_ranks
from tests.support.run_case import BOUNDS, records, run_stage
from tests.support.shares import whole
from tests.support.tiny_models import replace_section, write_stable_diffusion

ITERATIONS, DECAY = 6, 0.4
"""The first three updates decay by (1 + n) / (10 + n), the others by DECAY."""
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "pipeline_layout": "decoder*2|decoder*1,M"}
DP2 = {"overlap_grad_reduce": True, "overlap_param_gather": True}
WHOLE_STATE = {"use_distributed_optimizer": False}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("models") / "stable-diffusion")


def config_of(stable_diffusion: Path, folder: Path, until: int, **settings) -> RunConfig:
    """settings: `parallel`, `lora`, `decay`, `precision`, `save_interval`."""
    config = conversion_config("instruct", stable_diffusion.parent)
    config = replace_section(config, "parallel", **settings.get("parallel", {}))
    config = dataclasses.replace(config, lora=LoraConfig(rank=settings.get("lora", 0)))
    training = {"precision": settings.get("precision", "fp32"), "train_iters": until}
    config = replace_section(config, "training", **training, eval_iters=1)
    rates = {"lr": 1e-2, "lr_warmup_iters": 1, "lr_decay_style": "constant"}
    decay = settings.get("decay", DECAY)
    config = replace_section(config, "optimizer", **rates, ema_decay=decay)
    interval = settings.get("save_interval", 1000)
    config = replace_section(config, "checkpoint", save_interval=interval, keep_last=0)
    return replace_section(config, "logging", output_dir=str(folder), tensorboard=False)


def train(
    stable_diffusion: Path, folder: Path, ranks: int = 1, until: int = ITERATIONS, **settings
):
    """(losses of all iterations so far, parameters before the first of this start)."""
    config = config_of(stable_diffusion, folder, until, **settings)
    ran = run_ranks(ranks, run_stage, config)
    losses = [line["loss"] for line in records(config) if "loss" in line]
    return losses, whole([rank.before for rank in ran], tolerance=1e-6)


def averages(path: Path) -> dict[str, np.ndarray]:
    source = CheckpointTensors(path, ema=True).apart()
    return {name: source.read(name).float().numpy() for name in source.names()}


def expected(folder: Path, start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the definition, from the weights of every iteration of a run."""
    found = {name: value.astype(np.float64) for name, value in start.items()}
    for n in range(1, ITERATIONS + 1):
        source = CheckpointTensors(folder / "checkpoints" / f"iter_{n:07d}").apart()
        decay = min(DECAY, (1 + n) / (10 + n))
        for name in source.names():
            weights = source.read(name).double().numpy()
            rows = found[name][: len(weights)] if weights.ndim else found[name]
            found[name] = decay * rows + (1 - decay) * weights
    return found


@pytest.fixture(scope="module")
def single_process(stable_diffusion, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, *train(stable_diffusion, folder, save_interval=1)


def test_the_average_is_what_its_definition_says(single_process):
    folder, _, start = single_process
    found, wanted = averages(folder), expected(folder, start)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)
    source = CheckpointTensors(folder)
    moved = [name for name in source.names() if name.startswith(("decoder.", "aligner_m."))]
    assert moved
    for name in moved:
        assert not np.allclose(found[name], source.read(name).numpy(), atol=1e-6), name


def test_training_is_the_same_without_and_no_average_is_kept(
    single_process, stable_diffusion, tmp_path
):
    folder, losses, _ = single_process
    without, _ = train(stable_diffusion, tmp_path, decay=0.0)
    assert without == losses
    one, other = CheckpointTensors(folder), CheckpointTensors(tmp_path)
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())
    with pytest.raises(ConversionError, match=r"no average .* optimizer\.ema_decay=0"):
        CheckpointTensors(tmp_path, ema=True)
    given = ("--input", str(tmp_path), "--output", str(tmp_path / "out"), "--ema")
    assert convert(["export-mllm", *given]) == 2
    assert not (tmp_path / "out").exists()


def test_a_resumed_average_is_exactly_the_unbroken_one(single_process, stable_diffusion, tmp_path):
    folder, _, _ = single_process
    train(stable_diffusion, tmp_path, until=2)
    train(stable_diffusion, tmp_path)
    found, wanted = averages(tmp_path), averages(folder)
    assert all(np.array_equal(found[name], value) for name, value in wanted.items())


def test_any_layout_takes_back_what_another_saved(single_process, stable_diffusion, tmp_path):
    folder, _, start = single_process
    train(stable_diffusion, tmp_path, 2, until=2, parallel=TP2)
    train(stable_diffusion, tmp_path, 2, until=4, parallel=DP2)
    train(stable_diffusion, tmp_path, 2, parallel=PP2)
    found, wanted = averages(tmp_path), averages(folder)
    off = sum(np.square(found[name] - value).sum() for name, value in wanted.items())
    way = sum(np.square(value - start[name][: len(value)]).sum() for name, value in wanted.items())
    assert np.sqrt(off / way) <= BOUNDS["fp32"].update


@pytest.mark.parametrize("parallel", [DP2, WHOLE_STATE])
def test_of_16_bit_weights_the_average_is_float32_also_resumed(
    parallel, stable_diffusion, tmp_path
):
    settings = {"parallel": parallel, "precision": "bf16", "save_interval": 1}
    _, start = train(stable_diffusion, tmp_path, 2, until=3, **settings)
    train(stable_diffusion, tmp_path, 2, **settings)
    found, wanted = averages(tmp_path), expected(tmp_path, start)
    for name, value in wanted.items():
        bound = np.abs(value).max() / 128
        np.testing.assert_allclose(found[name], value, rtol=0, atol=bound, err_msg=name)
    source = CheckpointTensors(tmp_path, ema=True)
    dtypes = {info.dtype for info in source.names().values()}
    assert dtypes == {torch.float32, torch.bfloat16}  # what is frozen has no average
    assert source.export_dtype is torch.bfloat16


def test_a_run_may_begin_and_end_its_average_anywhere(stable_diffusion, tmp_path):
    train(stable_diffusion, tmp_path, until=2, decay=0.0)
    train(stable_diffusion, tmp_path, until=3)
    before, now = (
        CheckpointTensors(tmp_path / "checkpoints" / f"iter_000000{n}").apart() for n in (2, 3)
    )
    found = averages(tmp_path)
    for name in now.names():
        wanted = torch.lerp(before.read(name), now.read(name), 1 - 2 / 11)
        np.testing.assert_allclose(found[name], wanted.numpy(), rtol=0, atol=1e-6)
    train(stable_diffusion, tmp_path, until=4, decay=0.0)
    with pytest.raises(ConversionError, match="no average"):
        CheckpointTensors(tmp_path, ema=True)


def test_exports_take_the_averages_of_weights_and_of_adapters(
    single_process, stable_diffusion, tmp_path
):
    folder, _, _ = single_process
    source = CheckpointTensors(folder, ema=True)
    export_hf(folder, stable_diffusion, tmp_path / "averaged", ema=True)
    import_hf(tmp_path / "averaged", tmp_path / "back")
    back = CheckpointTensors(tmp_path / "back")
    assert all(torch.equal(back.read(name), source.read(name)) for name in back.names())

    train(stable_diffusion, tmp_path / "lora", 2, parallel=TP2, lora=3)
    adapted = CheckpointTensors(tmp_path / "lora", ema=True)
    module = adapted.adapted()[0]
    a, b = adapted.adapter(module)
    base = adapted.apart().read(f"{module}.weight")
    assert not torch.equal(b, CheckpointTensors(tmp_path / "lora").adapter(module)[1])
    torch.testing.assert_close(adapted.read(f"{module}.weight"), base + 16.0 / 3 * b @ a)
    for ema in (False, True):
        export_lora(tmp_path / "lora", tmp_path / f"peft_{ema}", ema=ema)
    files = [
        (tmp_path / f"peft_{ema}/adapter_model.safetensors").read_bytes() for ema in (False, True)
    ]
    assert len(files[0]) == len(files[1]) and files[0] != files[1]


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_a_decay_lies_below_one(decay, stable_diffusion, tmp_path):
    config = config_of(stable_diffusion, tmp_path, ITERATIONS, decay=decay)
    with pytest.raises(ConfigError, match="optimizer.ema_decay"):
        validate_layout(config, 1, stage_facts("instruct"))
