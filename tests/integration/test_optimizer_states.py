"""Optimizer states on the host, and in less than float32: trained, saved and resumed on the CPU,
through Megatron-Core's own code for a GPU (`tests/support/pretended_gpu.py`)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.checkpoint.folder import find_checkpoint
from megatron_kosmosg.checkpoint.plain_data import read_common
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel import fused_adam
from megatron_kosmosg.training.optimizer import check_optimizer
from tests.support.fake_stage import fake_config
from tests.support.pretended_gpu import train_offloaded, train_with_fused_adam
from tests.support.ranks import run_ranks
from tests.support.run_metrics import curve, norms
from tests.support.training_runs import train

AWARE = {
    "use_precision_aware_optimizer": True,
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
}


def config(folder: Path, accept_changes: tuple[str, ...] = (), **optimizer) -> RunConfig:
    checkpoint = {"save_interval": 3, "accept_changes": accept_changes}
    training = {"precision": "bf16"}
    return fake_config(str(folder), training=training, checkpoint=checkpoint, optimizer=optimizer)


def forget_the_last(folder: Path) -> None:
    """What was saved after the last update."""
    shutil.rmtree(folder / "checkpoints" / "iter_0000006")


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> list[float]:
    """Losses with float32 states where Megatron-Core keeps them."""
    folder = tmp_path_factory.mktemp("usual")
    run_ranks(2, train, config(folder))
    return curve(folder)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_states_on_the_host_train_alike_and_resume_exactly(tmp_path, usual, fraction):
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    run_ranks(2, train_offloaded, config(tmp_path, **offload))
    straight = curve(tmp_path), norms(tmp_path)
    assert straight[0] == pytest.approx(usual, rel=1e-3)
    forget_the_last(tmp_path)
    saved = read_common(find_checkpoint(tmp_path / "checkpoints"))
    (group,) = saved["optimizer"]["optimizer"]["param_groups"]
    assert group["step"] == 3 and "cpu_optimizer_cls" not in group
    run_ranks(2, train_offloaded, config(tmp_path, **offload))
    assert (curve(tmp_path), norms(tmp_path)) == straight
    forget_the_last(tmp_path)
    run_ranks(2, train, config(tmp_path))
    assert curve(tmp_path) == pytest.approx(usual, rel=1e-3)


def test_moments_in_bf16_train_alike_and_resume_exactly(tmp_path, usual):
    run_ranks(2, train_with_fused_adam, config(tmp_path, **AWARE))
    straight = curve(tmp_path), norms(tmp_path)
    assert straight[0] == pytest.approx(usual, rel=0.02) and straight[0] != usual
    forget_the_last(tmp_path)
    run_ranks(2, train_with_fused_adam, config(tmp_path, **AWARE))
    assert (curve(tmp_path), norms(tmp_path)) == straight
    # Checkpoints hold float32: a run without TransformerEngine takes them where it is told to.
    forget_the_last(tmp_path)
    run_ranks(2, train, config(tmp_path, tuple(f"optimizer.{key}" for key in AWARE)))
    assert curve(tmp_path) == pytest.approx(usual, rel=0.02)


def test_where_neither_can_be_is_said_before_a_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(fused_adam, "install", lambda: "apex")
    offloaded = config(tmp_path, optimizer_cpu_offload=True)
    with pytest.raises(ConfigError, match="on the CPU; set optimizer.optimizer_cpu_offload=false"):
        check_optimizer(offloaded, torch.device("cpu"))
    check_optimizer(offloaded, torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="needs the FusedAdam of TransformerEngine.* of: apex"):
        check_optimizer(config(tmp_path, **AWARE), torch.device("cuda", 0))
