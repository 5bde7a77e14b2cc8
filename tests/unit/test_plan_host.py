"""The machine's own memory and the size of checkpoints, planned and measured; adapters' FLOPs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_kosmosg.checkpoint.save_and_resume import Checkpointer, TrainingProgress
from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.config.schema import LoraConfig, RunConfig
from megatron_kosmosg.models import flops
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.monitoring.node_health import memory_gib, memory_warnings
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.fake_world import pretend_rank
from megatron_kosmosg.planning.estimate import Estimate, estimate
from megatron_kosmosg.planning.gpus import GPUS, Efficiency
from megatron_kosmosg.planning.host_memory import HostPlan, plan_host
from megatron_kosmosg.planning.model_counts import (
    model_shares,
    trained_and_frozen,
    whole_model,
)
from megatron_kosmosg.planning.pipeline_stage_cost import pipeline_stage_work
from megatron_kosmosg.planning.workload import MicroBatch, latent_shape, micro_batches
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.training.setup import build_trained
from tests.support.ranks import run_ranks
from tests.support.tiny_models import replace_section, tiny_config, write_stable_diffusion

MIB = 2**20


def planned(config: RunConfig, world_size: int, per_node: int = 8) -> HostPlan:
    world, model = rank_grid(config, world_size), whole_model(config)
    shares, parameters = model_shares(config, model), trained_and_frozen(model)
    batches = micro_batches(config, num_microbatches(config, world.num_replicas))
    return plan_host(config, world, shares, batches, parameters, per_node)


def estimated(overrides: list[str]) -> tuple[Estimate, HostPlan]:
    """What is planned for the update, and for the machine, of the recipe for one GPU."""
    config = load_config("instruct_1gpu", overrides)
    world, shares = rank_grid(config, 1), model_shares(config, whole_model(config))
    found = estimate(config, world, GPUS["a100-80"], Efficiency(), shares)
    return found, planned(config, 1)


def saved(config: RunConfig) -> float:
    """By how many bytes a save made this rank larger."""
    context = platform.initialize(config)
    try:
        stage = build_stage(config, context)
        trained = build_trained(stage, config, context, takes_initial_weights=False)
        run = trained.modules, trained.optimizer, trained.scheduler
        checkpointer = Checkpointer(config, context, *run, {}, trained.average)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now's
        before = in_status("VmRSS")
        checkpointer.save(TrainingProgress(1, 8, 1))
        return in_status("VmHWM") - before
    finally:
        platform.teardown()


def in_status(name: str) -> int:
    output = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", output)[1]) * 1024


@pytest.mark.parametrize("ema_decay", [0.0, 0.999])
def test_a_save_takes_what_is_planned_and_not_much_less(ema_decay, tmp_path):
    stable_diffusion = write_stable_diffusion(tmp_path / "stable-diffusion")
    config = tiny_config("instruct", stable_diffusion, tmp_path / "run")
    wide = {"hidden_size": 768, "ffn_hidden_size": 3072}
    decoder = dataclasses.replace(config.model.decoder, **wide)
    config = replace_section(config, "model", decoder=decoder)
    config = replace_section(config, "optimizer", ema_decay=ema_decay, lr_warmup_iters=0)
    plan = planned(config, 2)
    assert plan.rank.saving > 300 * MIB
    # gloo gathers into one buffer more, float32, which NCCL does not.
    (held,) = model_shares(config, whole_model(config)).counts
    expected = plan.rank.saving + 4 * held.gradient_elements
    for grown in run_ranks(2, saved, config):
        assert 0.85 * expected < grown < 1.05 * expected + 16 * MIB
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("iter_*")
    on_disk = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert plan.checkpoint == pytest.approx(on_disk, rel=0.02)


def test_the_fullest_node_counts_and_checkpoints_at_a_time():
    config = load_config("instruct_256gpu", ["checkpoint.keep_last=3", "checkpoint.keep_every=0"])
    plan = planned(config, 256)
    assert plan.ranks == 8 and plan.kept == 4
    # 1.6 of 1.9 billion weights train: 12 bytes of state, and 2 of the weight itself.
    assert plan.checkpoint / 1e9 == pytest.approx(23, rel=0.1)
    assert plan.node.total == pytest.approx(8 * plan.rank.total)
    assert plan.as_dict()["node_memory_gib"]["total"] == pytest.approx(plan.node.total / 2**30)
    averaged = replace_section(config, "optimizer", ema_decay=0.999)
    assert planned(averaged, 256).node.saving > 1.1 * plan.node.saving
    adapted = dataclasses.replace(config, lora=LoraConfig(rank=64))
    assert planned(adapted, 256).node.saving < 0.3 * plan.node.saving
    alone = replace_section(adapted, "checkpoint", weights="all")
    frozen = trained_and_frozen(whole_model(adapted))[1]
    assert planned(alone, 256).checkpoint - planned(adapted, 256).checkpoint == 2 * frozen
    assert planned(replace_section(config, "checkpoint", keep_last=0), 256).kept is None


OFFLOAD = "optimizer.optimizer_cpu_offload=true"
MOMENTS = ("exp_avg_dtype", "exp_avg_sq_dtype")
AWARE = ["optimizer.use_precision_aware_optimizer=true", *(f"optimizer.{n}=bf16" for n in MOMENTS)]


def test_states_that_the_host_keeps_move_from_the_gpu_to_the_machine():
    """All 12 bytes of a weight that trains, or half of them; the host has gradients beside them,
    and the update takes its time."""
    usual, half, moved = (
        estimated(more)
        for more in ([], [OFFLOAD, "optimizer.optimizer_offload_fraction=0.5"], [OFFLOAD])
    )
    on_gpu = [found.kinds[0].memory for found, _ in (usual, half, moved)]
    trained = on_gpu[0].gradients / 4
    assert [memory.optimizer for memory in on_gpu] == [12 * trained, 6 * trained, 0]
    assert on_gpu[2].total < on_gpu[0].total - 12 * trained
    nodes = [plan.node for _, plan in (usual, half, moved)]
    assert [node.optimizer for node in nodes] == [0, 10 * trained, 20 * trained]
    assert nodes[2].total >= nodes[0].total + 20 * trained
    lines = [plan.lines()[0] for _, plan in (usual, moved)]
    assert ["optimizer" in line for line in lines] == [False, True]
    seconds = [found.parts["optimizer"] for found, _ in (usual, half, moved)]
    assert 20 * seconds[0] < seconds[2] and seconds[1] < 0.6 * seconds[2]


def test_moments_in_bf16_take_half_and_more_while_they_are_updated():
    usual, small = (estimated(more)[0].kinds[0].memory for more in ([], AWARE))
    trained = usual.gradients / 4
    assert (usual.optimizer, small.optimizer) == (12 * trained, 8 * trained)
    # FusedAdam makes float32 of all moments, when activations are gone.
    at_work = usual.activations + usual.score_activations
    assert small.activations + small.score_activations == max(at_work, 8 * trained)


# Warnings of the preflight


def machine(root: Path, available_gib: int, limit: str, used: int) -> Path:
    group = root / "sys" / "fs" / "cgroup" / "job"
    (group / "step").mkdir(parents=True)
    (root / "proc" / "self").mkdir(parents=True)
    output = f"MemTotal: 99 kB\nMemAvailable:   {available_gib * MIB} kB\n"
    (root / "proc" / "meminfo").write_text(output)
    (root / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    return root


@pytest.mark.parametrize(("limit", "free"), [("max", 64), (str(40 * 2**30), 30)])
def test_free_memory_is_the_machines_or_what_the_jobs_limit_leaves(limit, free, tmp_path):
    root = machine(tmp_path, 64, limit, 10 * 2**30)
    assert memory_gib(root) == free
    assert memory_warnings(free, root) == []
    (warning,) = memory_warnings(free + 1, root)
    assert f"{free} GiB of memory are free" in warning and "--mem" in warning


def test_a_kernel_that_does_not_say_gives_no_warning(tmp_path):
    assert memory_gib(tmp_path) is None and memory_warnings(1e9, tmp_path) == []


# Adapters


def test_adapters_and_frozen_weights_cost_what_their_real_passes_count():
    """The decoder at full size on the meta device, one row of 215 positions."""
    settings = [
        "parallel.tensor_model_parallel_size=1",
        "lora.rank=64",
        "score.placement=colocated",
    ]
    config = load_config("instruct_256gpu", [*settings, "parallel.sequence_parallel=false"])
    (spec,) = model_shares(config, whole_model(config)).specs
    batch = MicroBatch(images=1, rows=1, length=215, prompt_images=2)
    work = {each.module: each for each in pipeline_stage_work(config, spec, True, batch)}
    with pretend_rank(rank_grid(config, 1), 0) as context:
        model = KosmosG(config, context, output_head=False, aligner_parts=("M",))
        model.requires_grad_(False)
        for name, parameter in model.decoder.named_parameters():
            parameter.requires_grad_("lora_" in name)
        hidden = torch.empty(215, 1, 2048, device="meta", requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            model.decoder(hidden, None).sum().backward()
    decoder = work["decoder"]
    assert decoder.forward + decoder.backward == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert work["resampler"].backward == work["vision"].backward == 0
    together = flops.instruct_flops(config, num_tokens=215, num_images=2, num_targets=1)
    whole = dataclasses.replace(config, lora=LoraConfig())
    assert together < 0.9 * flops.instruct_flops(whole, 215, 2, 1)
    trained = dataclasses.replace(config, lora=LoraConfig(rank=64, trains=["vision_encoder"]))
    assert [flops.updates(trained, part) for part in ("resampler", "aligner_m")] == [2, 2]


def test_latents_are_those_of_the_vae_in_the_folder():
    """The toy's have three times the channels of Stable Diffusion v1.5's, a quarter of a side."""
    toy = load_config("toy_instruct", [])
    assert latent_shape(toy) == (12, 8, 8)
    assert latent_shape(load_config("toy_instruct", ["model.diffusion.path=null"])) == (4, 4, 4)
    assert latent_shape(load_config("instruct_256gpu", [])) == (4, 64, 64)


def test_what_is_no_vae_s_config_is_named(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": 3}')
    config = load_config("toy_instruct", [f"model.diffusion.path={tmp_path}"])
    with pytest.raises(InputError, match=r"vae/config\.json is no VAE's"):
        latent_shape(config)
