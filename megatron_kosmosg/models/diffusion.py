"""The frozen half of the model: Stable Diffusion's U-Net, VAE and noise schedule.

Nothing in here is ever trained or changed; gradients pass through the U-Net to its condition only
(paper section 2.3, "score distillation"). Works with every `prediction_type`. Long because loading,
latents, prediction and its target are of one model, which nothing else opens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.frozen_weights import weights_variant
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusers_types import (
    decoded,
    load_noise_scheduler,
    move,
    posterior,
    schedule_config,
    unet_config,
    vae_config,
    velocity,
)
from megatron_kosmosg.models.read_frozen import reading_frozen
from megatron_kosmosg.parallel.devices import convolution_format
from megatron_kosmosg.parallel.platform import torch_dtype


class _One:
    """A factor or divisor of 1.0: what it is applied to stays as it is, and nothing is launched."""

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> torch.Tensor:
        if function not in _SCALING or kwargs:
            raise TypeError(f"this factor is made for products and quotients, not for {function}")
        return next(arg for arg in args if isinstance(arg, torch.Tensor))


_SCALING = (torch.Tensor.div, torch.Tensor.mul, torch.mul)
_FACTORS = {
    Attention: "rescale_output_factor",
    ResnetBlock2D: "output_scale_factor",
    Timesteps: "scale",
}
"""{module of diffusers: its factor, 1 unless configured otherwise}"""


def skip_scaling_by_one(network: UNet2DConditionModel | AutoencoderKL) -> None:
    """Has the blocks of a frozen network launch nothing for a factor of 1."""
    for module in network.modules():
        name = next((_FACTORS[kind] for kind in _FACTORS if isinstance(module, kind)), None)
        if name is not None and getattr(module, name) == 1:
            setattr(module, name, _One())


UNetPass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(noisy latents [b, channels, h, w], timesteps [b], condition [b, c, d]) -> like latents."""


def unet_pass(
    unet: UNet2DConditionModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    condition: torch.Tensor,
) -> torch.Tensor:
    """Runs the U-Net itself, in its dtype: the plain UNetPass."""
    return unet(noisy_latents, timesteps, encoder_hidden_states=condition).sample


@torch.no_grad()
def vae_moments(vae: AutoencoderKL, pixel_values: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the posterior, not scaled: float32 [b, 2, channels, h, w].

    pixel_values: [b, 3, height, width] in [-1, 1].
    """
    moments = posterior(vae, pixel_values.to(vae.dtype))
    return torch.stack([moments.mean.float(), moments.std.float()], dim=1)


def load_vae(path: str | Path | None, dtype: torch.dtype) -> AutoencoderKL:
    """The frozen VAE in `path`/vae, on the CPU. Raises ConfigError when it is missing or cannot be
    read."""
    folder = Path(path or "") / "vae"
    if path is None or not folder.is_dir():
        raise ConfigError(f"{path!r} has no folder 'vae'; give a folder in diffusers format")
    with reading_frozen(str(folder)):
        variant = weights_variant(folder)
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, variant=variant)
    return vae.eval().requires_grad_(False)


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """Hash of the weights that moments depend on: the encoder's, in float32 as loaded."""
    digest = hashlib.blake2b(digest_size=12, person=b"kosmosg-vae")
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}|".encode())
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class FrozenDiffusion:
    """U-Net, VAE and noise schedule of one Stable Diffusion folder, frozen and in eval mode."""

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, noise_scheduler: DDPMScheduler
    ) -> None:
        self.unet = unet.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.noise_scheduler = noise_scheduler
        self.faster_unet: UNetPass | None = None
        """The pass of `predict` where a gradient is wanted; faster_passes.py sets it."""
        self.faster_moments: Callable[[torch.Tensor], torch.Tensor] | None = None
        """The same of `moments`."""

    @classmethod
    def from_folder(
        cls,
        path: str | Path | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        recompute: bool = False,
    ) -> FrozenDiffusion:
        """The components under `path` (`unet/ vae/ scheduler/`) on `device` in `dtype`.

        Weights are mapped from their safetensors files (diffusers does so where accelerate is
        installed): a node reads them once, its ranks share the pages, and a rank's own copy is the
        one on its device. On a CPU it owns what changes dtype or becomes channels-last. Where a
        folder has the weights of a variant alone (fp16), those are read.

        recompute: gradient checkpointing inside the U-Net.
        Raises ConfigError when a component is missing or cannot be read.
        """
        folder = Path(path or "")
        for part in ("unet", "vae", "scheduler"):
            if path is None or not (folder / part).is_dir():
                raise ConfigError(
                    f"model.diffusion.path={path!r} has no folder '{part}'; give a Stable "
                    "Diffusion folder in diffusers format, with unet/, vae/ and scheduler/."
                )
        with reading_frozen(f"model.diffusion.path={path}"):
            unet = UNet2DConditionModel.from_pretrained(
                folder / "unet", torch_dtype=dtype, variant=weights_variant(folder / "unet")
            )
            vae = AutoencoderKL.from_pretrained(
                folder / "vae", torch_dtype=dtype, variant=weights_variant(folder / "vae")
            )
            noise_scheduler = load_noise_scheduler(folder / "scheduler")
        if recompute:
            unet.enable_gradient_checkpointing()
        skip_scaling_by_one(unet)
        skip_scaling_by_one(vae)
        move(unet, device, memory_format=convolution_format(device))
        move(vae, device)
        return cls(unet, vae, noise_scheduler)

    @property
    def num_timesteps(self) -> int:
        return schedule_config(self.noise_scheduler).num_train_timesteps

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position, along one side."""
        return 2 ** (len(vae_config(self.vae).block_out_channels) - 1)

    def latent_shape(self, image_size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """The (channels, height, width) of the latents of an image of `image_size` pixels.

        Without a size: at the size the U-Net was trained for.
        """
        unet = unet_config(self.unet)
        if image_size is None:
            return unet.in_channels, unet.sample_size, unet.sample_size
        (height, width), scale = image_size, self.vae_scale_factor
        return unet.in_channels, height // scale, width // scale

    def moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the VAE's posterior, by `vae_moments` in float32."""
        if self.faster_moments is not None:
            return self.faster_moments(pixel_values)
        return vae_moments(self.vae, pixel_values)

    def sample_latents(self, moments: torch.Tensor, posterior_noise: torch.Tensor) -> torch.Tensor:
        """Scaled latents [b, channels, h, w], float32, drawn from the posterior.

        moments: [b, 2, channels, h, w], any float dtype; posterior_noise: like latents, N(0, 1).
        """
        mean, std = moments.float().unbind(dim=1)
        latents = mean + std * posterior_noise
        vae = vae_config(self.vae)
        return (latents - (vae.shift_factor or 0.0)) * vae.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [b, 3, height, width] in [-1, 1], float32, of scaled latents."""
        vae = vae_config(self.vae)
        latents = latents / vae.scaling_factor + (vae.shift_factor or 0.0)
        return decoded(self.vae, latents.to(self.vae.dtype)).float().clamp(-1, 1)

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """The U-Net's output, float32; differentiable in `condition` only.

        noisy_latents: [b, channels, h, w]; timesteps: [b]; condition: [b, c, d].
        """
        dtype = self.unet.dtype
        noisy_latents = noisy_latents.to(
            dtype, memory_format=convolution_format(noisy_latents.device)
        )
        condition = condition.to(dtype)
        if self.faster_unet is not None and torch.is_grad_enabled() and condition.requires_grad:
            return self.faster_unet(noisy_latents, timesteps, condition).float()
        return unet_pass(self.unet, noisy_latents, timesteps, condition).float()

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the U-Net was trained to output, by the scheduler's `prediction_type`."""
        prediction_type = schedule_config(self.noise_scheduler).prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return latents
        if prediction_type == "v_prediction":
            return velocity(self.noise_scheduler, latents, noise, timesteps)
        raise ConfigError(
            f"The scheduler's prediction_type is {prediction_type!r}; epsilon, sample and "
            "v_prediction are supported (scheduler/scheduler_config.json)."
        )

    def signal_to_noise(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 [b] of the noise schedule, float32."""
        alphas = self.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        return alphas / (1 - alphas)


def load_diffusion(config: RunConfig, device: torch.device) -> FrozenDiffusion:
    """The frozen U-Net and VAE of `model.diffusion.path`, checked against AlignerNet's width."""
    diffusion = FrozenDiffusion.from_folder(
        config.model.diffusion.path,
        device=device,
        dtype=torch_dtype(config.training.precision),
        recompute=config.score.recompute,
    )
    width = unet_config(diffusion.unet).cross_attention_dim
    if width != config.model.aligner.hidden_size:
        raise ConfigError(
            f"The U-Net in {config.model.diffusion.path} reads conditions of width {width}, "
            f"AlignerNet gives {config.model.aligner.hidden_size}; set "
            "model.aligner.hidden_size, or give another model.diffusion.path."
        )
    return diffusion
