"""What `performance` asks for is used where it gives the same, else left aside with a line.

Compiled blocks are traced and differentiated by torch's compiler, and run by torch's operators: the
C++ that it would write takes minutes of a CPU.
"""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from megatron_kosmosg.config.schema import ScoreConfig
from megatron_kosmosg.models import faster_passes
from megatron_kosmosg.models.diffusion import FrozenDiffusion, load_diffusion
from megatron_kosmosg.models.faster_passes import compile_frozen_blocks, take_faster_passes
from megatron_kosmosg.models.vision_encoder import VisionEncoder
from megatron_kosmosg.parallel.cuda_graphs import _Recorded, record_passes
from megatron_kosmosg.parallel.devices import convolution_format
from megatron_kosmosg.score.loss import DenoisingLoss
from tests.support.tiny_models import (
    CONDITION_WIDTH,
    NUM_QUERIES,
    TARGET_SIZE,
    replace_section,
    tiny_config,
    write_stable_diffusion,
)

ROWS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(autouse=True)
def no_machine_code(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def config_of(folder, **performance):
    config = tiny_config("instruct", folder, folder)
    config = replace_section(config, "data", target_image_size=TARGET_SIZE)
    return replace_section(config, "performance", **performance)


def tried(folder, **performance) -> FrozenDiffusion:
    config = config_of(folder, **performance)
    diffusion = load_diffusion(config, CPU)
    take_faster_passes(diffusion, config, ROWS)
    return diffusion


def loss_and_gradient(diffusion, rows: int = ROWS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(rows, NUM_QUERIES, CONDITION_WIDTH, generator=generator)
    pixels = torch.rand(rows, 3, TARGET_SIZE, TARGET_SIZE, generator=generator) * 2 - 1
    condition.requires_grad_()
    loss = DenoisingLoss(diffusion, ScoreConfig(), 1)(
        condition, pixels, torch.arange(rows), "instruct"
    )
    return [loss.detach(), *torch.autograd.grad(loss.sum(), condition)]


def check_same(diffusion, folder) -> None:
    expected = loss_and_gradient(load_diffusion(config_of(folder), CPU))
    for found, plain in zip(loss_and_gradient(diffusion), expected, strict=True):
        assert (found - plain).norm() <= 1e-5 * plain.norm()


def test_compiled_blocks_give_the_plain_gradient(folder, caplog):
    with caplog.at_level(logging.INFO):
        diffusion = tried(folder, compile="regional", fuse_qkv=True)
    assert caplog.messages[-3:] == [
        "performance.fuse_qkv=true: the U-Net runs so",
        "performance.compile=regional: the U-Net runs so",
        "performance.compile=regional: the VAE runs so",
    ]
    check_same(diffusion, folder)


def test_every_shape_of_residual_block_is_compiled(folder, caplog, tmp_path):
    """More than torch's compiler makes of one class by itself."""
    torch.manual_seed(0)
    for part in ("vae", "scheduler"):
        (tmp_path / part).symlink_to(folder / part)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 24, 32),
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        layers_per_block=2,
        cross_attention_dim=CONDITION_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    unet.save_pretrained(tmp_path / "unet")
    blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock2D)]
    shapes = {(block.in_channels, block.out_channels) for block in blocks}
    assert len(shapes) > 8
    with caplog.at_level(logging.INFO):
        diffusion = tried(tmp_path, compile="regional")
    assert "performance.compile=regional: the U-Net runs so" in caplog.messages
    check_same(diffusion, tmp_path)


def test_convolutions_are_channels_last_where_that_was_measured_faster(folder):
    """On a CPU; on an H200 group norms copied what they read and wrote (docs/gpu_results.md)."""
    weight = load_diffusion(config_of(folder), CPU).unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert convolution_format(torch.device("cuda")) is torch.contiguous_format


def test_nothing_is_done_unless_it_is_asked_for(folder):
    diffusion = tried(folder)
    assert diffusion.faster_unet is None and diffusion.faster_moments is None


def zero_the_output(unet) -> None:
    unet.conv_out.weight = torch.nn.Parameter(torch.zeros_like(unet.conv_out.weight))


def detach_the_condition(unet) -> None:
    """The output stays, and the gradient is wrong: one cross-attention's part is missing."""
    attention = next(m for n, m in unet.named_modules() if n.endswith("attn2"))
    plain = attention.forward

    def forward(states, encoder_hidden_states=None, **options):
        return plain(states, encoder_hidden_states=encoder_hidden_states.detach(), **options)

    attention.forward = forward


def fail(unet) -> None:
    raise RuntimeError("no compiler\nhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (zero_the_output, "for its output would be off by"),
        (detach_the_condition, "for its gradient would be off by"),
        (fail, "for it cannot run so here: no compiler here"),
    ],
)
def test_what_gives_something_else_is_left_aside_with_a_line(
    change, words, folder, caplog, monkeypatch
):
    monkeypatch.setattr(faster_passes, "_fuse_qkv", change)
    diffusion = tried(folder, fuse_qkv=True)
    assert diffusion.faster_unet is None
    (line,) = caplog.messages
    assert (
        line.startswith("performance.fuse_qkv=true: the U-Net stays as it is, ") and words in line
    )
    assert "\n" not in line
    check_same(diffusion, folder)


def test_a_step_that_fails_leaves_the_others(folder, caplog):
    diffusion = tried(folder, fuse_qkv=True, nhwc_group_norm=True, compile="cudagraph")
    assert diffusion.faster_unet is not None and diffusion.faster_moments is None
    assert len(caplog.messages) == 3  # group norm, and the graphs of both networks
    assert any("CUDA graphs need a GPU" in line for line in caplog.messages)
    check_same(diffusion, folder)


def test_recorded_passes_are_replayed_at_the_size_of_training_alone(folder):
    diffusion = load_diffusion(config_of(folder), CPU)
    batch = faster_passes._unet_batch(
        diffusion, (ROWS, *diffusion.latent_shape((TARGET_SIZE, TARGET_SIZE))),
        (ROWS, NUM_QUERIES, CONDITION_WIDTH),
    )  # fmt: skip
    ran, replayed = [], []

    def run(*inputs):
        ran.append(inputs)
        return diffusion.unet(*inputs).sample

    def replay(*inputs):
        replayed.append(inputs)
        return diffusion.unet(*inputs).sample

    diffusion.faster_unet = _Recorded(run, replay, batch)
    check_same(diffusion, folder)
    loss_and_gradient(diffusion)
    assert (len(replayed), len(ran)) == (2, 0)
    loss_and_gradient(diffusion, rows=ROWS - 1)
    assert (len(replayed), len(ran)) == (2, 1)


def test_a_pass_is_not_replayed_over_one_that_is_under_way():
    x = torch.ones(2, requires_grad=True)
    passes = _Recorded(lambda x: 3 * x, lambda x: 2 * x, [x])
    first, second = passes(x), passes(x)
    assert (first[0], second[0]) == (2, 3)
    first.sum().backward()
    assert passes(x)[0] == 2


def test_what_a_pass_without_a_gradient_returned_outlives_the_next():
    """A score rank encodes targets ahead, of several requests."""
    memory = torch.zeros(2)
    passes = _Recorded(lambda x: 3 * x, lambda x: memory.copy_(2 * x), [torch.ones(2)])
    first, second = passes(torch.ones(2)), passes(torch.full((2,), 5.0))
    assert (first[0], second[0]) == (2, 10)


def test_graphs_need_a_gpu():
    with pytest.raises(RuntimeError, match="need a GPU"):
        record_passes(torch.sin, [torch.ones(1)])


@pytest.mark.parametrize("divides", [True, False])
def test_division_by_one_is_skipped_and_by_another_factor_is_not(folder, divides):
    diffusion = load_diffusion(config_of(folder), CPU)
    block = diffusion.unet.down_blocks[0].resnets[0]
    if divides:
        block.output_scale_factor = 2.0
    factor = block.output_scale_factor
    x, time = torch.randn(1, 16, 4, 4), torch.randn(1, 64)
    with torch.profiler.profile() as profile:
        output = block(x, time)
    assert any(event.name == "aten::div" for event in profile.events()) == divides
    block.output_scale_factor = 2.0 if divides else 1.0
    assert torch.equal(output, block(x, time)) and torch.equal(x / factor, x / float(1 + divides))


def test_frozen_blocks_of_the_tower_are_compiled_and_give_the_same(folder, caplog):
    config = config_of(folder, compile="regional")
    torch.manual_seed(0)
    encoder = VisionEncoder(config).requires_grad_(False)
    for module in encoder.trainable_modules(1):
        module.requires_grad_(True)
    images = torch.randn(2, 3, 28, 28)
    plain = encoder(images)
    with caplog.at_level(logging.INFO):
        compile_frozen_blocks(encoder, config)
    assert caplog.messages[-1] == "performance.compile=regional: the image tower runs so"
    compiled = [block._compiled_call_impl is not None for block in encoder.tower.encoder.layers]
    assert compiled == [True, True, False]
    for count in (2, 3):
        more = torch.cat([images, images[:1]])[:count]
        assert (encoder(more)[:2] - plain).norm() <= 1e-5 * plain.norm()
