"""Trains the toy U-Net: captions through the frozen text model -> latents of the autoencoder.

Predicts the latents themselves (`prediction_type: sample`); the weight min(SNR + 1, 4) and the
skewed timesteps favour high noise, where the caption matters. Noise on the condition lets the
U-Net forgive what an aligned language model gets slightly wrong.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from megatron_kosmosg.toy.toy_captions import caption
from megatron_kosmosg.toy.training import checkpoint, pool
from megatron_kosmosg.toy.training.clip_tokenizer import token_ids
from megatron_kosmosg.toy.training.latents import Posteriors

ONE_ENTITY_SHARE = 0.28
CAPTION_DROP = 0.1
CONDITION_NOISE = 0.1
TIMESTEP_POWER = 0.7
MAX_LOSS_WEIGHT = 4.0
AVERAGE_DECAY = 0.999


def build(channels: int, condition_width: int) -> UNet2DConditionModel:
    """An untrained U-Net for 8x8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=condition_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def noise_scheduler() -> DDPMScheduler:
    """The noise schedule; its config goes with the weights."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        steps_offset=1,
    )


class Conditions:
    """Captions -> noisy conditions, some of them of the empty caption."""

    def __init__(self, text_model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        self._text_model, self._tokenizer = text_model, tokenizer
        self._empty = self.of([""])

    @torch.no_grad()
    def of(self, captions: list[str]) -> Tensor:
        """The conditions of captions, [n, positions, width]."""
        ids = torch.tensor(token_ids(self._tokenizer, captions))
        return self._text_model(ids).last_hidden_state

    def for_training(self, captions: list[str], generator: torch.Generator) -> Tensor:
        """The conditions of captions, [n, positions, width], with drops and noise from the
        generator."""
        states = self.of(captions)
        dropped = torch.rand(len(captions), generator=generator) < CAPTION_DROP
        states = torch.where(dropped[:, None, None], self._empty, states)
        return states + CONDITION_NOISE * torch.randn(states.shape, generator=generator)


def denoising_loss(
    unet: UNet2DConditionModel,
    schedule: Tensor,
    latents: Tensor,
    condition: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Weighted squared error of the predicted latents; `schedule` is alphas_cumprod."""
    count = len(latents)
    drawn = torch.rand(count, generator=generator) ** TIMESTEP_POWER * len(schedule)
    timesteps = drawn.long().clamp(max=len(schedule) - 1)
    signal = schedule[timesteps][:, None, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    noisy = signal.sqrt() * latents + (1.0 - signal).sqrt() * noise
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    found = unet(noisy, timesteps, encoder_hidden_states=condition).sample
    weight = (1.0 / (1.0 - schedule[timesteps])).clamp(max=MAX_LOSS_WEIGHT)
    return ((found - latents).square().mean((1, 2, 3)) * weight).mean()


def draw_rows(data: Posteriors, batch_size: int, rng: np.random.Generator) -> Tensor:
    """Rows of a batch: a fixed share of one-entity scenes, then scenes of two."""
    ones = int(batch_size * ONE_ENTITY_SHARE)
    parts = [
        data.rows[number][rng.integers(0, len(data.rows[number]), count)]
        for number, count in ((1, ones), (2, batch_size - ones))
    ]
    return torch.cat(parts)


def train(
    run: Path,
    data: Posteriors,
    conditions: Conditions,
    unet: UNet2DConditionModel,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> dict[str, Tensor]:
    """Averaged weights; continues from RUN/decoder.pt and leaves its result there under `ema`."""
    network: Any = unet  # Any: no annotation of `to` takes a memory format alone
    network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    average = checkpoint.Average(unet, AVERAGE_DECAY)
    start = 0
    if (state := checkpoint.load(run / "decoder.pt")) is not None:
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["opt"])
        average.weights, start = state["ema"], state["step"]
    schedule = noise_scheduler().alphas_cumprod
    progress = pool.StepProgress("decoder", steps, 100, start)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = draw_rows(data, batch_size, np.random.default_rng((seed, step)))
        captions = [
            caption(data.scenes[row], "mix", (seed, step, i)) for i, row in enumerate(rows.tolist())
        ]
        latents = data.sample(rows, generator)
        condition = conditions.for_training(captions, generator)
        decay = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        rate = learning_rate * min(1.0, (step + 1) / 200) * (0.01 + 0.99 * decay)
        optimizer.param_groups[0]["lr"] = rate
        loss = denoising_loss(unet, schedule, latents, condition, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(unet, step)
        progress.update(step + 1, loss=loss.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {"model": unet.state_dict(), "opt": optimizer.state_dict()}
            checkpoint.save(run / "decoder.pt", state | {"ema": average.weights, "step": step + 1})
    return average.weights
