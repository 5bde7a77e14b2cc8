"""The authors' weights and inputs (tests/golden) through our model on any layout.

`numbers_on_a_rank` runs on every rank and gives its share of the answer; `Numbers` puts the shares
together under the authors' names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

from megatron_kosmosg.config.schema import (
    AlignerConfig,
    DecoderConfig,
    FrozenFolder,
    ModelConfig,
    ParallelConfig,
    ResamplerConfig,
    RunConfig,
    ScoreConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_kosmosg.conversion.authors import authors_table
from megatron_kosmosg.conversion.tensors import InMemory, as_ours
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.models.multimodal_lm import padded_vocab_size
from megatron_kosmosg.models.parameter_count import meta_model
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.stages.freezing import train_only
from megatron_kosmosg.stages.instruct import InstructStage
from tests.authors_files import load_golden
from tests.distributed.layout_case import complete_outputs
from tests.distributed.shares import fill, gradients, whole
from tests.distributed.stage_gradients import run_step
from tests.tiny_models import TARGET_SIZE

_EMBEDDING = "embedding.word_embeddings.weight"


def golden_config(golden: dict, stage: str, parallel: Mapping, num_rows: int = 3) -> RunConfig:
    """A run of the authors' tiny model, without dropout; num_rows: of a global batch, 3 or 6."""
    sizes = golden["sizes"]
    model = ModelConfig(
        vocab_size=golden["vocab_size"],
        decoder=DecoderConfig(
            num_layers=sizes["layers"],
            hidden_size=sizes["hidden"],
            ffn_hidden_size=sizes["ffn"],
            num_attention_heads=sizes["heads"],
            hidden_dropout=0.0,
        ),
        vision=VisionConfig(
            num_layers=sizes["vis_layers"],
            hidden_size=sizes["vis_width"],
            ffn_hidden_size=4 * sizes["vis_width"],
            num_attention_heads=sizes["vis_heads"],
            image_size=sizes["image"],
            patch_size=sizes["patch"],
        ),
        # The released code gives the resampler as many heads as the decoder.
        resampler=ResamplerConfig(
            num_latent_queries=sizes["latents"],
            num_attention_heads=sizes["heads"],
            attention_dropout=0.0,
        ),
        aligner=AlignerConfig(
            num_layers=sizes["al_layers"],
            hidden_size=sizes["al_dim"],
            ffn_hidden_size=sizes["al_ffn"],
            num_attention_heads=sizes["al_heads"],
            num_queries=sizes["cond_tokens"],
            max_positions=sizes["max_pos"],
        ),
    )
    return RunConfig(
        stage=stage,
        model=model,
        parallel=ParallelConfig(timeout_seconds=60, **parallel),
        training=TrainingConfig(
            micro_batch_size=3, global_batch_size=num_rows, seed=3, precision="fp32"
        ),
    )


def our_weights(golden: dict, config: RunConfig) -> dict[str, torch.Tensor]:
    """The authors' weights under our names; each of theirs is used once or known to be unused."""
    table, theirs = authors_table(config.model), InMemory(golden["model"])
    whole_model = meta_model(config, True, ("M", "N"))
    names = [name for name, _ in whole_model.named_parameters()]
    table.check(golden["model"], names)
    ours = as_ours(table, theirs, names)
    weights = {name: ours.read(name) for name in names}
    missing = padded_vocab_size(golden["vocab_size"], 1) - golden["vocab_size"]
    weights[_EMBEDDING] = F.pad(weights[_EMBEDDING], (0, 0, 0, missing))
    return weights


def under_their_names(
    golden: dict, config: RunConfig, tensors: Mapping[str, np.ndarray], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Whole tensors (parameters or gradients) under the authors' `names`."""
    table = authors_table(config.model)
    ours = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if _EMBEDDING in ours:
        ours[_EMBEDDING] = ours[_EMBEDDING][: golden["vocab_size"]]
    found = {}
    for name in names:
        sources, make = table.theirs_from(name)
        found[name] = make([ours[source] for source in sources])
    return found


def numbers_on_a_rank(index: int, parallel: Mapping, stable_diffusion: Path) -> dict:
    """This rank's share of everything that is compared, for golden file `index`.

    "align", "diff", "instruct": (outputs per micro-batch, gradients); "image_features".
    """
    golden = load_golden(index)
    config = golden_config(golden, "pretrain", parallel)
    instruct = instruct_config(golden, parallel, stable_diffusion)
    layout = platform.initialize(config)
    try:
        weights = our_weights(golden, config)
        batch = [golden["inputs"]]
        answer = {
            "align": _step(_GoldenAlign(golden, weights, config, layout), layout, batch),
            "diff": _step(_GoldenDenoising(golden, weights, config, layout), layout, batch),
            "instruct": _step(
                _GoldenInstruct(weights, instruct, layout), layout, instruct_batches(golden)
            ),
        }
        if layout.is_first_stage:
            model = KosmosG(config, layout, output_head=False)
            fill(model, layout, weights)
            with torch.no_grad():
                features = model.resampler(model.vision_encoder(golden["inputs"]["images"]))
            answer["image_features"] = features.flatten(0, 1).numpy()
        return answer
    finally:
        platform.teardown()


def _step(stage, layout: Layout, batches: list[dict[str, torch.Tensor]]) -> tuple:
    reports, model = run_step(stage, stage.config, layout, iter(batches))
    outputs = [{key: value.numpy() for key, value in report.items()} for report in reports]
    return outputs, gradients(model, layout)


class _GoldenStage:
    """What the authors' script computed, as a stage: a loss over the outputs for one batch."""

    def __init__(
        self, golden: dict, weights: Mapping[str, torch.Tensor], config: RunConfig, layout: Layout
    ) -> None:
        self.config = config
        self._golden, self._weights, self._layout = golden, weights, layout

    def build_model(self, layout: Layout) -> list[torch.nn.Module]:
        model = KosmosG(self.config, layout, output_head=True, aligner_parts=("M", "N"))
        fill(model, layout, self._weights)
        train_only(model, self._trained(model))
        return [model]

    def forward_step(self, data_iterator: Iterator[dict], model: torch.nn.Module):
        inputs = next(data_iterator)
        output = model(
            inputs["tokens"], inputs["image_slots"], inputs["tokens"] == 1, inputs["images"]
        )

        def loss_func(output):
            losses = self._losses(output)
            loss = sum(losses.values())
            report = {"loss": loss} | losses | complete_outputs(output, self._layout)
            report = {key: value.detach().clone() for key, value in report.items()}
            return loss, torch.tensor(1, dtype=torch.int), report

        return output, loss_func


class _GoldenAlign(_GoldenStage):
    def _trained(self, model: KosmosG) -> list:
        return [model.aligner_m, model.aligner_n]

    def _losses(self, output: dict) -> dict[str, torch.Tensor]:
        hidden, target = output["hidden"].detach(), self._golden["inputs"]["clip_embed"]
        scale = 77 / hidden.shape[1]  # a literal 77 in their code, whatever the number of queries
        return {
            "mse_loss": (output["condition"] - target).square().mean(),
            "rec_loss": scale * (output["reconstruction"] - hidden).square().mean(),
        }


class _GoldenDenoising(_GoldenStage):
    def _trained(self, model: KosmosG) -> list:
        return [model.embedding, model.decoder, model.output_layer, model.resampler]

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

    def __init__(self, weights: Mapping[str, torch.Tensor], config, layout: Layout) -> None:
        super().__init__(config, layout)
        self._weights = weights

    def build_model(self, layout: Layout) -> list[torch.nn.Module]:
        (model,) = super().build_model(layout)
        fill(model, layout, self._weights)
        return [model]


def instruct_config(golden: dict, parallel: Mapping, stable_diffusion: Path) -> RunConfig:
    """A run of `instruct` with the authors' tiny weights: two micro-batches of three rows."""
    config = golden_config(golden, "instruct", parallel, num_rows=6)
    model = dataclasses.replace(config.model, diffusion=FrozenFolder(str(stable_diffusion)))
    return dataclasses.replace(config, model=model, score=ScoreConfig(condition_drop_prob=0.5))


def instruct_batches(golden: dict) -> list[dict[str, torch.Tensor]]:
    """The authors' prompts twice, each time with other pictures to draw."""
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
                "stream_positions": torch.arange(3) + 10 + 3 * index,
            }
        )
    return batches


class Numbers:
    """The ranks' answers put together."""

    def __init__(self, golden: dict, config: RunConfig, answers: list[dict]) -> None:
        self._golden, self._config, self._answers = golden, config, answers

    def output(self, part: str, key: str, micro_batch: int = 0) -> torch.Tensor:
        """An output or loss of the last pipeline stage; all its ranks must agree."""
        found = [answer[part][0] for answer in self._answers if answer[part][0]]
        first, *others = [torch.from_numpy(outputs[micro_batch][key]) for outputs in found]
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=1e-6 * float(first.abs().max()))
        return first

    def image_features(self) -> torch.Tensor:
        """Of the first pipeline stage's first rank."""
        return torch.from_numpy(self._answers[0]["image_features"])

    def gradients(self, part: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole gradients under the authors' names."""
        together = whole([answer[part][1] for answer in self._answers], tolerance=2e-6)
        return under_their_names(self._golden, self._config, together, names)


def errors(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Largest absolute difference over the wanted tensor's largest entry, by name."""
    assert found.keys() == wanted.keys()
    return {name: error(found[name], wanted[name]) for name in wanted}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference over the wanted tensor's largest entry."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())
