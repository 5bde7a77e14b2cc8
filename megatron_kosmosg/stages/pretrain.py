"""Stage 1, multimodal language modelling (paper section 2.1): next text token, images interleaved.

Trains the decoder, the resampler, the last CLIP block and the CLIP post-norm.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.samples import ImageStream, PackedRow, Split
from megatron_kosmosg.data.streams import pretrain_stream
from megatron_kosmosg.evaluation.evaluator import Evaluator
from megatron_kosmosg.losses import token_cross_entropy
from megatron_kosmosg.models.flops import pretrain_flops
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.score.remote import RemoteScore
from megatron_kosmosg.stages.facts import PRETRAIN
from megatron_kosmosg.stages.freezing import build_frozen
from megatron_kosmosg.training.stage import InitialWeights, Probe


class PretrainStage:
    name = PRETRAIN.name

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

    def build_model(self, context: ParallelContext) -> list[KosmosG]:
        """Decoder with tied output head, resampler and image tower."""
        is_new = self.config.checkpoint.load is None and self.config.model.vision.path is None
        if is_new and context.rank == 0:
            warnings.warn(
                "model.vision.path is not set: the image tower starts from random weights, and all "
                "but its last blocks stay so",
                stacklevel=2,
            )
        return build_frozen(PRETRAIN, self.config, context)

    def build_dataset(self, split: Split) -> ImageStream[PackedRow]:
        """Packed rows of text, captioned images and interleaved documents."""
        context = self._context
        return pretrain_stream(
            self.config, split, context.device.index, context.is_first_pipeline_stage
        )

    def forward_step(self, data_iterator: Iterator[dict[str, torch.Tensor]], model: nn.Module):
        """Next-token loss on the text tokens of one micro-batch (mcore's contract)."""
        batch = next(data_iterator)
        output = model(
            batch["tokens"], batch["image_mask"], batch["padding_mask"], batch["pixel_values"]
        )

        tp_group = self._context.process_groups.tp

        def loss_func(output):
            loss = token_cross_entropy(
                output["logits"], batch["labels"], batch["loss_mask"], tp_group
            )
            num_tokens = batch["loss_mask"].sum()
            report = {"loss": torch.stack([loss.detach(), num_tokens])}
            return loss, num_tokens.int(), report

        return output, loss_func

    def initial_weights(self) -> InitialWeights | None:
        """None, to begin from scratch (CLIP from `model.vision.path`), or another pretrain
        checkpoint."""
        if self.config.checkpoint.load is None:
            return None
        return InitialWeights(self.config.checkpoint.load, stage="pretrain")

    def probe(self, model: Sequence[nn.Module], iteration: int) -> Probe:
        """Empty: nothing is reported beyond the held-out loss."""
        return Probe()

    def flops_per_iteration(self, num_tokens: int, num_images: int, num_targets: int) -> float:
        return pretrain_flops(self.config, num_tokens, num_images)
