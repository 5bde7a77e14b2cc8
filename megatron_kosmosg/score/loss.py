"""Condition in, loss out: the denoising loss of the frozen U-Net (paper section 2.3).

`ColocatedScore` holds the U-Net on every decoder replica and splits a micro-batch's rows over the
replica's tensor-parallel ranks: plain slicing would give each rank another AlignerNet gradient.
Noise, timesteps and the posterior sample are keyed by stream position, so that any layout and any
resume draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_kosmosg.config.schema import ScoreConfig
from megatron_kosmosg.data.keyed import torch_generator
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.score.rows import row_range, sum_over_tensor_ranks, take_rows


@dataclass(frozen=True)
class ScoreKey:
    """Where keyed random draws come from: every draw also takes a stream position and a tag."""

    seed: int
    stream: str
    """Name of the sample stream, e.g. `instruct` or `instruct-heldout`."""

    def uniform(self, positions: torch.Tensor, tag: str) -> torch.Tensor:
        """One float32 number in [0, 1) per stream position; CPU tensor [b]."""
        return torch.stack(
            [torch.rand((), generator=self._generator(p, tag)) for p in positions.tolist()]
        )

    def normal(self, positions: torch.Tensor, tag: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal noise [b, *shape], float32 on the CPU, one generator per position."""
        rows = [torch.randn(shape, generator=self._generator(p, tag)) for p in positions.tolist()]
        return torch.stack(rows) if rows else torch.empty(0, *shape)

    def _generator(self, position: int, tag: str) -> torch.Generator:
        return torch_generator(self.seed, self.stream, position, tag)


def drop_condition(
    condition: torch.Tensor, null_condition: torch.Tensor, drop: torch.Tensor
) -> torch.Tensor:
    """Condition [b, c, d] whose rows under `drop` [b] (True = dropped) are the null condition.

    null_condition: [1, c, d]; gradient flows into it.
    """
    return torch.where(drop[:, None, None].to(condition.device), null_condition, condition)


class ColocatedScore:
    """The frozen U-Net on the ranks that compute the condition, rows split over tensor ranks."""

    def __init__(
        self, diffusion: FrozenDiffusion, layout: Layout, config: ScoreConfig, seed: int
    ) -> None:
        self._denoising = DenoisingLoss(diffusion, config, seed)
        self._layout = layout

    def __call__(
        self,
        condition: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        positions: torch.Tensor,
        stream: str,
    ) -> torch.Tensor:
        """Denoising loss summed over the micro-batch's images, equal on every tensor rank.

        condition: [b, c, d]; targets: pixels [b, 3, height, width] in [-1, 1], or the moments of
        their posteriors [b, 2, channels, h, w]; weights: of the images in the sum [b]; positions:
        stream positions [b]; stream: name of the sample stream (key of the draws).
        """
        rows = row_range(len(condition), self._layout)
        mine = take_rows(condition, self._layout)
        losses = self._denoising(mine, targets[rows], positions[rows].cpu(), stream)
        return sum_over_tensor_ranks((losses * weights[rows]).sum(), self._layout)


class DenoisingLoss:
    """The loss of each image, wherever the U-Net sits."""

    def __init__(self, diffusion: FrozenDiffusion, config: ScoreConfig, seed: int) -> None:
        self._diffusion = diffusion
        self._config = config
        self._seed = seed

    def __call__(
        self,
        condition: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor,
        stream: str,
    ) -> torch.Tensor:
        """Denoising loss per image [b], float32; arguments as of ColocatedScore but for the
        weights, positions on the CPU."""
        if len(condition) == 0:  # ragged split: keep the graph so that backward still communicates
            return condition.float().sum(dim=(1, 2))
        key = ScoreKey(self._seed, stream)
        diffusion, device = self._diffusion, condition.device
        timesteps = self._timesteps(key.uniform(positions, "timestep")).to(device)
        moments = targets if targets.ndim == 5 else diffusion.moments(targets)
        shape = tuple(moments.shape[2:])
        latents = diffusion.sample_latents(
            moments, key.normal(positions, "posterior", shape).to(device)
        )
        noise = key.normal(positions, "noise", shape).to(device)
        noisy_latents = diffusion.noise_scheduler.add_noise(latents, noise, timesteps)
        prediction = diffusion.predict(noisy_latents, timesteps, condition)
        target = diffusion.target(latents, noise, timesteps)
        error = (prediction - target).square().mean(dim=(1, 2, 3))
        return self._weight(timesteps) * error

    def _timesteps(self, uniform: torch.Tensor) -> torch.Tensor:
        num_timesteps = self._diffusion.num_timesteps
        if self._config.timestep_sampling == "power":
            uniform = uniform**self._config.timestep_power
        return (uniform * num_timesteps).long().clamp(max=num_timesteps - 1)

    def _weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss weight per image [b], converted to the units of the prediction type."""
        snr = self._diffusion.signal_to_noise(timesteps)
        if self._config.loss_weighting == "none":
            return torch.ones_like(snr)
        shift = 1.0 if self._config.loss_weighting == "capped_snr_plus_one" else 0.0
        weight_of_latent_error = (snr + shift).clamp(max=self._config.snr_gamma)
        # epsilon error = SNR * latent error and v error = (SNR + 1) * latent error.
        units = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
        prediction_type = self._diffusion.noise_scheduler.config.prediction_type
        return weight_of_latent_error / units[prediction_type]
