"""Stage 2, aligning (paper section 2.2): M maps the decoder's states of a caption to what the
diffusion model's own text encoder gives for it, and N maps them back. Text only.

Trains AlignerNet M and N; everything else is frozen, yet the decoder's dropout is active, as in
the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
from torch import nn
from transformers import CLIPTextModel

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.frozen_weights import TRANSFORMERS, weights_variant
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.untrusted_folders import check_model_config
from megatron_kosmosg.data.samples import CaptionSample, Split, StreamDataset
from megatron_kosmosg.data.streams import align_stream
from megatron_kosmosg.evaluation.evaluator import Evaluator
from megatron_kosmosg.losses import alignment_loss, reconstruction_loss
from megatron_kosmosg.models.flops import align_flops
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.models.read_frozen import reading_frozen
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.devices import on_device
from megatron_kosmosg.score.remote import RemoteScore
from megatron_kosmosg.stages.facts import ALIGN
from megatron_kosmosg.stages.freezing import build_frozen
from megatron_kosmosg.training.stage import InitialWeights, Probe


class AlignStage:
    name = ALIGN.name

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        remote_score: RemoteScore | None = None,
        evaluators: Mapping[str, Evaluator] = MappingProxyType({}),
    ) -> None:
        """Builds this rank's part of the model. `evaluators` have nothing to measure here, as no
        images are drawn."""
        self.config = config
        self.remote_score = remote_score
        self._context = context
        self._text_encoder = (
            load_text_encoder(config, context) if context.is_last_pipeline_stage else None
        )

    def build_model(self, context: ParallelContext) -> list[KosmosG]:
        """Decoder without output head, and both halves of AlignerNet."""
        return build_frozen(ALIGN, self.config, context)

    def build_dataset(self, split: Split) -> StreamDataset[CaptionSample]:
        """Captions, as decoder tokens and as tokens of the text encoder."""
        return align_stream(self.config, split)

    def forward_step(self, data_iterator: Iterator[dict[str, torch.Tensor]], model: nn.Module):
        """Alignment plus reconstruction loss of one micro-batch (mcore's contract)."""
        batch = next(data_iterator)
        output = model(
            batch["tokens"],
            batch["image_mask"],
            batch["padding_mask"],
            batch["pixel_values"],
            batch.get("packed"),
        )

        def loss_func(output):
            with torch.no_grad():
                target = self._text_states(batch["clip_tokens"])
            condition = output["condition"]
            mse = alignment_loss(condition, target)
            reconstruction = reconstruction_loss(
                output["reconstruction"],
                output["hidden"],
                condition.shape[1],
                batch["padding_mask"] if "packed" in batch else None,
            )
            loss, count = mse + reconstruction, len(condition)
            cosine = torch.cosine_similarity(condition.float(), target.float(), dim=-1)
            parts = {
                "loss": loss,
                "mse_loss": mse,
                "reconstruction_loss": reconstruction,
                "cosine": cosine.mean(dim=1).sum(),
            }
            counted = torch.full((), count, dtype=torch.int, device=loss.device)
            report = {
                k: torch.stack([v.detach().float(), counted.float()]) for k, v in parts.items()
            }
            return loss, counted, report

        return output, loss_func

    def _text_states(self, clip_tokens: torch.Tensor) -> torch.Tensor:
        assert self._text_encoder is not None, "the last pipeline stage alone computes the loss"
        return self._text_encoder(clip_tokens).last_hidden_state

    def initial_weights(self) -> InitialWeights | None:
        """The decoder, resampler and image tower of `pretrain`; AlignerNet starts new."""
        path = cast(str, self.config.checkpoint.load)  # a setting that the stage needs (facts.py)
        return InitialWeights(path, stage="pretrain", absent=("aligner_m", "aligner_n"))

    def probe(self, model: Sequence[nn.Module], iteration: int) -> Probe:
        """Nothing beyond the held-out losses and cosine."""
        return Probe()

    def flops_per_iteration(self, num_tokens: int, num_images: int, num_targets: int) -> float:
        return align_flops(self.config, num_tokens, num_targets)


def load_text_encoder(config: RunConfig, context: ParallelContext) -> CLIPTextModel:
    """The diffusion model's text encoder, frozen, on this rank's device.

    In fp32 when training in fp32 (CPUs are slow in fp16), else in fp16 as the authors do: bf16
    would round the targets too coarsely. The dtype of the files says nothing.
    Raises ConfigError when the folder is missing or its shape does not fit AlignerNet.
    """
    path = config.model.clip_text.path
    folder = Path(path or "") / "text_encoder"
    if path is None or not folder.is_dir():
        raise ConfigError(
            f"model.clip_text.path={path!r} has no folder 'text_encoder'; give a Stable Diffusion "
            "folder, or one that holds text_encoder/ and tokenizer/."
        )
    dtype = torch.float32 if config.training.precision == "fp32" else torch.float16
    check_model_config(folder / "config.json")
    with reading_frozen(f"model.clip_text.path={path}"):
        variant = weights_variant(folder, TRANSFORMERS)
        encoder = CLIPTextModel.from_pretrained(folder, dtype=dtype, variant=variant)
    encoder.eval().requires_grad_(False)
    aligner, sizes = config.model.aligner, encoder.config
    found = (sizes.max_position_embeddings, sizes.hidden_size)
    if found != (aligner.num_queries, aligner.hidden_size):
        raise ConfigError(
            f"The text encoder in {folder} gives {found[0]} x {found[1]} states, AlignerNet "
            f"{aligner.num_queries} x {aligner.hidden_size}; set model.aligner.num_queries and "
            "model.aligner.hidden_size to the text encoder's."
        )
    return on_device(encoder, context.device)
