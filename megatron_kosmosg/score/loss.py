"""Condition in, loss out: the denoising loss of the frozen U-Net (paper section 2.3).

`ColocatedScore` holds the U-Net on every decoder replica and splits a micro-batch's rows over the
replica's tensor-parallel ranks: plain slicing would give each rank another AlignerNet gradient.
Noise, timesteps and the posterior sample come from keyed_noise.py.
"""

from __future__ import annotations

from typing import cast

import torch

from megatron_kosmosg.config.schema import ScoreConfig
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.transfers import upload
from megatron_kosmosg.score.keyed_noise import KeyedNoise, ScoreNoise
from megatron_kosmosg.score.row_split import row_range, sum_over_tensor_ranks, take_rows


def drop_condition(
    condition: torch.Tensor, null_condition: torch.Tensor, drop: torch.Tensor
) -> torch.Tensor:
    """Condition [b, c, d] whose rows under `drop` [b] (True = dropped) are the null condition.

    Args:
        null_condition: [1, c, d]; gradient flows into it.
    """
    return torch.where(drop[:, None, None].to(condition.device), null_condition, condition)


class ColocatedScore:
    """The frozen U-Net on the ranks that compute the condition, rows split over tensor ranks."""

    def __init__(
        self, diffusion: FrozenDiffusion, context: ParallelContext, config: ScoreConfig, seed: int
    ) -> None:
        self._denoising = DenoisingLoss(diffusion, config, seed)
        self._context = context

    def __call__(
        self,
        condition: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        positions: torch.Tensor,
        stream: str,
        keyed_noise: KeyedNoise | None = None,
    ) -> torch.Tensor:
        """Denoising loss summed over the micro-batch's images, equal on every tensor rank.

        Args:
            condition: [b, c, d].
            targets: pixels [b, 3, height, width] in [-1, 1], or the moments of their posteriors [b,
                2, channels, h, w].
            weights: of the images in the sum [b].
            positions: stream positions [b], on the CPU.
            stream: name of the sample stream (key of the draws).
            keyed_noise: what `ScoreNoise.noise` gave for them, where it was drawn before.
        """
        rows = row_range(len(condition), self._context)
        local = take_rows(condition, self._context)
        if keyed_noise is not None:
            keyed_noise = {name: values[rows] for name, values in keyed_noise.items()}
        losses = self._denoising(local, targets[rows], positions[rows], stream, keyed_noise)
        return sum_over_tensor_ranks((losses * weights[rows]).sum(), self._context)


class DenoisingLoss:
    """The loss of each image, wherever the U-Net sits."""

    def __init__(self, diffusion: FrozenDiffusion, config: ScoreConfig, seed: int) -> None:
        self._diffusion = diffusion
        self._config = config
        self._score_noise = ScoreNoise(config, seed)

    def __call__(
        self,
        condition: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor,
        stream: str,
        keyed_noise: KeyedNoise | None = None,
    ) -> torch.Tensor:
        """Denoising loss per image [b], float32; arguments as of ColocatedScore but for the
        weights."""
        if len(condition) == 0:  # ragged split: keep the graph so that backward still communicates
            return condition.float().sum(dim=(1, 2))
        diffusion = self._diffusion
        moments = targets if targets.ndim == 5 else diffusion.moments(targets)
        if keyed_noise is None:
            shape = tuple(moments.shape[2:])
            keyed_noise = self._score_noise.noise(positions, stream, shape, diffusion.num_timesteps)
            keyed_noise = {
                name: upload(values, condition.device) for name, values in keyed_noise.items()
            }
        timesteps, noise = keyed_noise["timesteps"], keyed_noise["noise"]
        latents = diffusion.sample_latents(moments, keyed_noise["posterior_noise"])
        # Integers of any kind will do, whatever its annotation says.
        places = cast(torch.IntTensor, timesteps)
        noisy_latents = diffusion.noise_scheduler.add_noise(latents, noise, places)
        prediction = diffusion.predict(noisy_latents, timesteps, condition)
        target = diffusion.target(latents, noise, timesteps)
        error = (prediction - target).square().mean(dim=(1, 2, 3))
        return error if self._config.loss_weighting == "none" else self._weight(timesteps) * error

    def _weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss weight per image [b], converted to the units of the prediction type."""
        snr = self._diffusion.signal_to_noise(timesteps)
        shift = 1.0 if self._config.loss_weighting == "capped_snr_plus_one" else 0.0
        weight_of_latent_error = (snr + shift).clamp(max=self._config.snr_gamma)
        # epsilon error = SNR * latent error and v error = (SNR + 1) * latent error.
        units = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
        prediction_type = self._diffusion.noise_scheduler.config["prediction_type"]
        return weight_of_latent_error / units[prediction_type]
