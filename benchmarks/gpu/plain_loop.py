"""`instruct` as a plain loop of transformers and diffusers trains it: the same model and batches,
without this project's layers, schedule, optimizer and step.

It gets what such a loop can have: bf16 autocast over float32 weights, a bf16 U-Net in the faster
memory format, SDPA, cached latents, fused AdamW, pinned batches, its own best batch, and
torch.compile.
Ours also computes the null condition's row, for which the loop takes zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import Kosmos2ForConditionalGeneration

from benchmarks.gpu.batches import RandomStream
from benchmarks.gpu.rows import Row, failed
from benchmarks.gpu.sizes import Sizes, run_config
from benchmarks.gpu.timing import Speed, best_batch, free_memory, speed
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.hf_aligner import aligner_arguments
from megatron_kosmosg.conversion.kosmos2 import kosmos2_config
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner
from megatron_kosmosg.hf.pipeline_kosmosg import language_states
from megatron_kosmosg.parallel.devices import convolution_format

EAGER, COMPILED = "plain loop, eager", "plain loop, torch.compile"
SCALING_FACTOR = 0.18215


class PlainLoop:
    """The models, what trains in them, and the optimizer."""

    def __init__(self, config: RunConfig, sizes: Sizes, device: torch.device) -> None:
        self._config, self._sizes, self._device = config, sizes, device
        folder = Path(config.model.diffusion.path)
        torch.manual_seed(0)
        with torch.device(device):
            self.mllm = Kosmos2ForConditionalGeneration._from_config(
                kosmos2_config(config), attn_implementation="sdpa", dtype=torch.float32
            )
            self.aligner = KosmosGAligner(**aligner_arguments(config))
        self.unet = UNet2DConditionModel.from_pretrained(
            folder / "unet", torch_dtype=torch.bfloat16
        ).to(device, memory_format=convolution_format(device))
        self.unet.eval().requires_grad_(False)
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        self._choose_what_trains()
        settings = config.optimizer
        self.trained = [
            *(p for p in self.mllm.parameters() if p.requires_grad),
            *self.aligner.parameters(),
        ]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=1e-6,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def _choose_what_trains(self) -> None:
        """As in `instruct`: the image tower but for its last block and norm is frozen."""
        tower = self.mllm.vision_model
        tower.requires_grad_(False)
        inner = getattr(tower, "model", tower)
        inner.encoder.layers[-1].requires_grad_(True)
        inner.post_layernorm.requires_grad_(True)
        self.mllm.train()

    def compile(self) -> None:
        """Every part, with fixed shapes."""
        for part in (self.mllm, self.aligner, self.unet):
            part.compile(backend=self._sizes.compiler, dynamic=False)

    def speed(self, rows: int, seconds: float) -> Speed:
        """Of updates on `rows` prompts."""
        length, images = self._sizes.rows["instruct"]
        stream = RandomStream(self._config, rows, length, images)
        on_host = stream.batch
        if self._device.type != "cpu":
            on_host = {name: tensor.pin_memory() for name, tensor in on_host.items()}

        def update() -> None:
            batch = {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in on_host.items()
            }
            self._loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, self._config.optimizer.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        try:
            return speed(update, rows, self._device, seconds)
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = len(batch["tokens"])
        with torch.autocast(self._device.type, torch.bfloat16):
            pixels = batch["pixel_values"]
            if pixels.dtype is torch.uint8:
                pixels = pixels.float() / 127.5 - 1
            states = language_states(self.mllm, batch["tokens"], batch["image_mask"], pixels)
            condition = self.aligner(states, batch["padding_mask"])
            dropped = torch.rand(rows, 1, 1, device=self._device) < 0.1
            condition = torch.where(dropped, torch.zeros_like(condition), condition)
        mean, deviation = batch["target_moments"].float().unbind(dim=1)
        latents = (mean + deviation * torch.randn_like(mean)) * SCALING_FACTOR
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (rows,), device=self._device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps).to(torch.bfloat16)
        noisy = noisy.to(memory_format=convolution_format(self._device))
        condition = condition.to(torch.bfloat16)
        predicted = self.unet(noisy, timesteps, encoder_hidden_states=condition).sample
        return F.mse_loss(predicted.float(), noise)


def plain_rows(sizes: Sizes, folder: Path, device: torch.device) -> Iterator[Row]:
    """Eager, then compiled from the eager loop's best batch on: it may have memory for a larger
    one."""
    config = run_config(sizes, "instruct", folder, "data.latent_cache=latents")
    loop, batches = PlainLoop(config, sizes, device), sizes.batches["instruct"]
    best, seen = best_batch(lambda rows: loop.speed(rows, sizes.seconds), batches)
    details = best.details() | {"batches": seen}
    yield Row("plain loop", EAGER, value=best.per_second, unit="images/s", details=details)
    free_memory()
    batches = tuple(batch for batch in batches if batch >= best.batch)
    try:
        loop.compile()
        found, seen = best_batch(lambda rows: loop.speed(rows, sizes.seconds), batches)
    except Exception as error:  # noqa: BLE001 - a compiler fails with whatever it likes
        yield failed("plain loop", COMPILED, error)
        return
    details = found.details() | {"batches": seen}
    yield Row("plain loop", COMPILED, value=found.per_second, unit="images/s", details=details)
