"""What is run for the comparison with the authors: three losses, each as a training stage.

Two are those of their script on the golden inputs; the third is the real `instruct` stage, started
from their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from megatron_kosmosg.config.schema import FrozenFolder, RunConfig, ScoreConfig
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.stages.freezing import train_only
from megatron_kosmosg.stages.instruct import InstructStage
from tests.support.authors_files import load_golden
from tests.support.golden_case import golden_config, our_weights
from tests.support.layout_case import complete_outputs
from tests.support.shares import fill, gradients
from tests.support.stage_gradients import run_step
from tests.support.tiny_models import TARGET_SIZE


def numbers_on_a_rank(index: int, parallel: Mapping, stable_diffusion: Path) -> dict:
    """This rank's share of everything that is compared, for golden file `index`.

    "align", "diff", "instruct": (outputs per micro-batch, gradients); "image_features".
    """
    golden = load_golden(index)
    config = golden_config(golden, "pretrain", parallel)
    instruct = instruct_config(golden, parallel, stable_diffusion)
    context = platform.initialize(config)
    try:
        weights = our_weights(golden, config)
        batch = [golden["inputs"]]
        answer = {
            "align": _step(_GoldenAlign(golden, weights, config, context), context, batch),
            "diff": _step(_GoldenDenoising(golden, weights, config, context), context, batch),
            "instruct": _step(
                _GoldenInstruct(weights, instruct, context), context, instruct_batches(golden)
            ),
        }
        if context.is_first_pipeline_stage:
            model = KosmosG(config, context, output_head=False)
            fill(model, context, weights)
            with torch.no_grad():
                features = model.resampler(model.vision_encoder(golden["inputs"]["images"]))
            answer["image_features"] = features.flatten(0, 1).numpy()
        return answer
    finally:
        platform.teardown()


def _step(stage, context: ParallelContext, batches: list[dict[str, torch.Tensor]]) -> tuple:
    reports, model = run_step(stage, stage.config, context, iter(batches))
    outputs = [{key: value.numpy() for key, value in report.items()} for report in reports]
    return outputs, gradients(model, context)


class _GoldenStage:
    """What the authors' script computed, as a stage: a loss over the outputs for one batch."""

    remote_score = None

    _trained: tuple[str, ...]
    """As StageFacts.trained."""

    def __init__(
        self,
        golden: dict,
        weights: Mapping[str, torch.Tensor],
        config: RunConfig,
        context: ParallelContext,
    ) -> None:
        self.config = config
        self._golden, self._weights, self._context = golden, weights, context

    def build_model(self, context: ParallelContext) -> list[torch.nn.Module]:
        model = KosmosG(self.config, context, output_head=True, aligner_parts=("M", "N"))
        fill(model, context, self._weights)
        return train_only([model], self._trained, context)

    def forward_step(self, data_iterator: Iterator[dict], model: torch.nn.Module):
        inputs = next(data_iterator)
        output = model(
            inputs["tokens"], inputs["image_slots"], inputs["tokens"] == 1, inputs["images"]
        )

        def loss_func(output):
            losses = self._losses(output)
            loss = sum(losses.values())
            report = {"loss": loss} | losses | complete_outputs(output, self._context)
            report = {key: value.detach().clone() for key, value in report.items()}
            return loss, torch.tensor(1, dtype=torch.int), report

        return output, loss_func


class _GoldenAlign(_GoldenStage):
    _trained = ("aligner_m", "aligner_n")

    def _losses(self, output: dict) -> dict[str, torch.Tensor]:
        hidden, target = output["hidden"].detach(), self._golden["inputs"]["clip_embed"]
        scale = 77 / hidden.shape[1]  # a literal 77 in their code, whatever the number of queries
        return {
            "mse_loss": (output["condition"] - target).square().mean(),
            "rec_loss": scale * (output["reconstruction"] - hidden).square().mean(),
        }


class _GoldenDenoising(_GoldenStage):
    _trained = ("embedding", "decoder", "output_layer", "resampler")

    def _losses(self, output: dict) -> dict[str, torch.Tensor]:
        return {"diff_loss": denoising_loss(self._golden, output["condition"])}


def denoising_loss(golden: dict, condition: torch.Tensor) -> torch.Tensor:
    """The authors' diff_loss of a condition, in its dtype: sum over images of per-image means.

    condition: [b, c, d], float32 or float64.
    """
    inputs, dtype = golden["inputs"], condition.dtype
    unet = UNet2DConditionModel(**golden["unet_config"]).eval().requires_grad_(False)
    unet.load_state_dict(golden["unet"])
    unet = unet.double() if dtype is torch.float64 else unet
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    latents, noise = inputs["latents"].to(dtype), inputs["noise"].to(dtype)
    noisy = schedule.add_noise(latents, noise, inputs["timesteps"])
    predicted = unet(noisy, inputs["timesteps"], condition).sample
    return (predicted - noise).square().mean(dim=(1, 2, 3)).sum()


class _GoldenInstruct(InstructStage):
    """The real stage, started from the authors' weights."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], config, context: ParallelContext
    ) -> None:
        super().__init__(config, context)
        self._weights = weights

    def build_model(self, context: ParallelContext) -> list[torch.nn.Module]:
        (model,) = super().build_model(context)
        fill(model, context, self._weights)
        return [model]


def instruct_config(golden: dict, parallel: Mapping, stable_diffusion: Path) -> RunConfig:
    """A run of `instruct` with the authors' tiny weights: two micro-batches of three rows."""
    config = golden_config(golden, "instruct", parallel, num_rows=6)
    model = dataclasses.replace(config.model, diffusion=FrozenFolder(str(stable_diffusion)))
    return dataclasses.replace(config, model=model, score=ScoreConfig(condition_drop_prob=0.5))


def instruct_batches(golden: dict) -> list[dict[str, torch.Tensor]]:
    """The authors' prompts twice, each time with other images to draw."""
    inputs = golden["inputs"]
    batches = []
    for index in range(2):
        generator = torch.Generator().manual_seed(index)
        targets = torch.rand(3, 3, TARGET_SIZE, TARGET_SIZE, generator=generator) * 2 - 1
        batches.append(
            {
                "tokens": inputs["tokens"],
                "image_mask": inputs["image_slots"],
                "padding_mask": inputs["tokens"] == 1,
                "pixel_values": inputs["images"],
                "target_pixel_values": targets,
                "target_weights": torch.ones(3),
                "stream_positions": torch.arange(3) + 10 + 3 * index,
            }
        )
    return batches
