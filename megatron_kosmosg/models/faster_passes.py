"""Faster passes of the frozen networks, each tried against the plain ones before it is used.

torch's compiler has given a condition gradient that was wrong by 15 %, silently. So whatever
`performance` asks for runs on one batch of the size of training, and its output and its gradient by
the condition must be the plain ones up to rounding; else it is left aside with one line. Passes
without a gradient (evaluation, drawing) and of other sizes stay plain.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusers_types import from_config, move
from megatron_kosmosg.models.diffusion import (
    FrozenDiffusion,
    UNetPass,
    skip_scaling_by_one,
    unet_pass,
    vae_moments,
)
from megatron_kosmosg.models.same_result import fixed_normal, tried
from megatron_kosmosg.models.vision_encoder import VisionEncoder
from megatron_kosmosg.parallel.cuda_graphs import record_passes
from megatron_kosmosg.parallel.devices import convolution_format
from megatron_kosmosg.parallel.platform import allow_graphs, torch_dtype

_OF_THE_TOWER = {"fullgraph": True, "dynamic": True}
"""Micro-batches have any number of images."""

_RESIDUAL_SHAPES = 32
"""Residual blocks of Stable Diffusion 1.5's U-Net differ in 14 ways; torch's compiler gives up
after 8 of one class unless it is told to go on."""

Network = TypeVar("Network", UNet2DConditionModel, AutoencoderKL)


@dataclass(frozen=True)
class _Trial:
    """One faster pass that the settings of `performance` ask for."""

    setting: str
    """As in the config, with its value."""
    change: Callable[[UNet2DConditionModel], None] | None = None
    """What it does to a copy of the network; None records the passes of what was taken so far."""


def take_faster_passes(diffusion: FrozenDiffusion, config: RunConfig, num_rows: int) -> None:
    """Tries what `config.performance` asks for, and has `diffusion` use what gives the same.

    num_rows: of the micro-batches, or parts of them, that this rank's U-Net works on.
    """
    requested = config.performance
    trials = []
    if requested.fuse_qkv:
        trials.append(_Trial("performance.fuse_qkv=true", _fuse_qkv))
    if requested.nhwc_group_norm:
        trials.append(_Trial("performance.nhwc_group_norm=true", _use_nhwc_group_norm))
    if requested.compile != "none":
        change = _compile_unet if requested.compile == "regional" else None
        trials.append(_Trial(f"performance.compile={requested.compile}", change))
    if not trials or num_rows == 0 or diffusion.unet.device.type == "meta":
        return
    size = (config.data.target_image_size, config.data.target_image_size)
    aligner = config.model.aligner
    condition_shape = (num_rows, aligner.num_queries, aligner.hidden_size)
    batch = _unet_batch(diffusion, (num_rows, *diffusion.latent_shape(size)), condition_shape)
    _try_unet(diffusion, trials, batch)
    if requested.compile != "none" and config.data.latent_cache is None:
        pixels = fixed_normal((num_rows, 3, *size)).clamp(-1, 1).to(diffusion.vae.device)
        _try_vae(diffusion, requested.compile, pixels)


def _try_unet(diffusion: FrozenDiffusion, trials: list[_Trial], batch: list[torch.Tensor]) -> None:
    plain = partial(unet_pass, diffusion.unet)
    expected = _with_gradient(plain, batch)
    changes: list[Callable[[UNet2DConditionModel], None]] = []
    taken: UNetPass = plain
    for trial in trials:

        def build(trial: _Trial = trial, taken: UNetPass = taken) -> UNetPass:
            if trial.change is None:
                return record_passes(taken, batch)
            unet = _copy_on_the_same_weights(diffusion.unet)
            if trial.change is not _compile_unet:  # which does that itself
                skip_scaling_by_one(unet)
            for change in (*changes, trial.change):
                change(unet)
            return partial(unet_pass, unet)

        def gradients(run: UNetPass) -> list[torch.Tensor]:
            return _with_gradient(run, batch)

        what = f"{trial.setting}: the U-Net"
        faster = tried(what, build, gradients, expected, diffusion.unet.dtype)
        if faster is not None:
            taken = diffusion.faster_unet = faster
            if trial.change is not None:
                changes.append(trial.change)


def _try_vae(diffusion: FrozenDiffusion, how: str, pixels: torch.Tensor) -> None:
    plain = partial(vae_moments, diffusion.vae)

    def build() -> Callable[[torch.Tensor], torch.Tensor]:
        if how == "cudagraph":
            with torch.no_grad():
                return record_passes(plain, [pixels])
        vae = _copy_on_the_same_weights(diffusion.vae)
        _compile_residual_blocks(vae.encoder)
        return partial(vae_moments, vae)

    def moments(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return [run(pixels)]

    diffusion.faster_moments = tried(
        f"performance.compile={how}: the VAE", build, moments, moments(plain), diffusion.vae.dtype
    )


def compile_frozen_blocks(encoder: VisionEncoder, config: RunConfig) -> None:
    """Tries `performance.compile=regional` on a copy of one of the image tower's frozen blocks, in
    the precision of training, and has all of them compiled where it gives the same."""
    blocks = [
        block
        for block in encoder.tower.encoder.layers
        if not any(parameter.requires_grad for parameter in block.parameters())
    ]
    if not blocks:
        return
    dtype, device = torch_dtype(config.training.precision), next(blocks[0].parameters()).device
    if device.type == "meta":
        return
    block = copy.deepcopy(blocks[0]).to(dtype)
    shape = (2, encoder.tower.embeddings.num_positions, encoder.tower.config.hidden_size)
    states = fixed_normal(shape).to(device, dtype).requires_grad_()

    def results(run: nn.Module) -> list[torch.Tensor]:
        output = run(states, None)
        (gradient,) = torch.autograd.grad(output.float().square().sum(), states)
        return [output.detach(), gradient]

    expected = results(block)

    def build() -> nn.Module:
        block.compile(**_OF_THE_TOWER)
        return block

    what = "performance.compile=regional: the image tower"
    if tried(what, build, results, expected, dtype) is not None:
        for frozen in blocks:
            frozen.compile(**_OF_THE_TOWER)


def _unet_batch(
    diffusion: FrozenDiffusion, shape: tuple[int, ...], condition_shape: tuple[int, ...]
) -> list[torch.Tensor]:
    """A UNetPass's arguments; the condition wants a gradient."""
    device, dtype = diffusion.unet.device, diffusion.unet.dtype
    latents = fixed_normal(shape).to(device, dtype)
    latents = latents.contiguous(memory_format=convolution_format(device))
    steps = torch.linspace(0, diffusion.num_timesteps - 1, shape[0] + 2)[1:-1].long().to(device)
    condition = fixed_normal(condition_shape).to(device, dtype).requires_grad_()
    return [latents, steps, condition]


def _with_gradient(run: UNetPass, batch: list[torch.Tensor]) -> list[torch.Tensor]:
    """[output, gradient by the condition] of a pass, for the squared distance to some target."""
    latents, timesteps, condition = batch
    # Not the batch's own: what was recorded reads its inputs from the tensors that it is handed.
    condition = condition.detach().clone().requires_grad_()
    output = run(latents, timesteps, condition)
    loss = (output.float() - latents.float().flip(0)).square().mean(dim=(1, 2, 3)).sum()
    (gradient,) = torch.autograd.grad(loss, condition)
    return [output.detach().clone(), gradient.clone()]


def _copy_on_the_same_weights(network: Network) -> Network:
    """Another network with the weights of this one, so that what is done to it is not to this."""
    with torch.device("meta"):
        copy = from_config(type(network), network.config)
    copy.load_state_dict(network.state_dict(), assign=True)
    if getattr(network, "is_gradient_checkpointing", False):
        copy.enable_gradient_checkpointing()
    return copy.eval().requires_grad_(False)


def _fuse_qkv(unet: UNet2DConditionModel) -> None:
    with torch.no_grad():
        unet.fuse_qkv_projections()
    unet.requires_grad_(False)


def _compile_unet(unet: UNet2DConditionModel) -> None:
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    _compile_residual_blocks(unet)


def _compile_residual_blocks(network: nn.Module) -> None:
    """Their norms, activations and sums are what moves most bytes outside of products."""
    allow_graphs(_RESIDUAL_SHAPES)
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            module.compile(fullgraph=True, dynamic=False)


def _use_nhwc_group_norm(unet: UNet2DConditionModel) -> None:
    """Replaces torch's GroupNorm modules by apex's, which read the same weight and bias. Raises
    ImportError where apex has none."""
    group_norm = importlib.import_module("apex.contrib.group_norm").GroupNorm
    move(unet, memory_format=torch.channels_last)
    for module in list(unet.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                faster = group_norm(child.num_groups, child.num_channels, child.eps, child.affine)
                faster.weight, faster.bias = child.weight, child.bias
                setattr(module, name, faster)
