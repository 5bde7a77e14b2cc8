"""Stage 3, compositional instruction tuning by score distillation (paper section 2.3).

Trains the decoder, the resampler, the last CLIP block with the post-norm and AlignerNet M through
the frozen U-Net. The null condition is `<s>` alone, an extra row of every micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from megatron.core.utils import get_model_config
from torch import nn

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.random_keys import StreamName
from megatron_kosmosg.data.samples import ImageStream, PromptSample, Split
from megatron_kosmosg.evaluation.evaluator import Evaluator
from megatron_kosmosg.models.diffusion import FrozenDiffusion, load_diffusion
from megatron_kosmosg.models.faster_passes import take_faster_passes
from megatron_kosmosg.models.flops import instruct_flops
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.models.lora import ADAPTERS
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.platform import torch_dtype
from megatron_kosmosg.score.generation import generate_images
from megatron_kosmosg.score.keyed_noise import CONDITION_DROP, ScoreNoise, noise_of_batch
from megatron_kosmosg.score.loss import ColocatedScore, drop_condition
from megatron_kosmosg.score.remote import RemoteScore
from megatron_kosmosg.score.row_split import row_range
from megatron_kosmosg.score.stream import open_stream
from megatron_kosmosg.stages.facts import INSTRUCT
from megatron_kosmosg.stages.freezing import build_frozen
from megatron_kosmosg.stages.held_out_images import held_out_images
from megatron_kosmosg.stages.null_condition import forward_with_null_row
from megatron_kosmosg.training.stage import InitialWeights, Probe


class InstructStage:
    name = INSTRUCT.name

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        remote_score: RemoteScore | None = None,
        evaluators: Mapping[str, Evaluator] = MappingProxyType({}),
    ) -> None:
        self.config = config
        self.remote_score = remote_score
        self._context = context
        self._evaluators = evaluators
        self._diffusion: FrozenDiffusion | None = None
        self._score: ColocatedScore | None = None
        if context.is_last_pipeline_stage and remote_score is None:
            self._diffusion = load_diffusion(config, context.device)
            rows = row_range(config.training.micro_batch_size, context)
            take_faster_passes(self._diffusion, config, rows.stop - rows.start)
            self._score = ColocatedScore(
                self._diffusion, context, config.score, config.training.seed
            )

    def build_model(self, context: ParallelContext) -> list[KosmosG]:
        """Decoder without output head, and AlignerNet M."""
        return build_frozen(INSTRUCT, self.config, context)

    def build_dataset(self, split: Split) -> ImageStream[PromptSample]:
        """Prompts that mix text and images, on the U-Net's ranks with the image to be drawn."""
        reads = "prompts" if self._score is None else "all"
        context = self._context
        return open_stream(
            self.config,
            context.device,
            split,
            reads,
            context.is_first_pipeline_stage,
            self._diffusion,
        )

    def forward_step(self, data_iterator: Iterator[dict[str, torch.Tensor]], model: nn.Module):
        """Denoising loss of one micro-batch (mcore's contract)."""
        batch = next(data_iterator)
        training = model.training
        if self.remote_score is not None:
            about = batch["stream_positions"], batch["replacements"]
            self.remote_score.prepare(*about, is_heldout=not training)
        output = forward_with_null_row(batch, model)

        def loss_func(output):
            stream = StreamName(self.name, "train" if training else "heldout").noise_key
            condition, null_condition = output["condition"][:-1], output["condition"][-1:]
            if training:
                drop = self._condition_drop(batch, stream)
                condition = drop_condition(condition, null_condition, drop)
            if self.remote_score is not None:
                return self._remote_loss(self.remote_score, condition, batch, model, training)
            assert self._score is not None, "the last pipeline stage alone computes the loss"
            cached = "target_moments" in batch
            targets = batch["target_moments" if cached else "target_pixel_values"]
            weights = batch["target_weights"]
            count = weights.sum().int()
            about = batch["stream_positions"], stream, noise_of_batch(batch)
            loss = self._score(condition, targets, weights, *about)
            return loss, count, {"loss": torch.stack([loss.detach(), count.float()])}

        return output, loss_func

    def _condition_drop(self, batch: dict[str, torch.Tensor], stream: str) -> torch.Tensor:
        if CONDITION_DROP in batch:
            return batch[CONDITION_DROP]
        noise = ScoreNoise(self.config.score, self.config.training.seed)
        return noise.condition_drop(batch["stream_positions"], stream)[CONDITION_DROP]

    def _remote_loss(
        self,
        remote_score: RemoteScore,
        condition: torch.Tensor,
        batch: dict[str, torch.Tensor],
        model: nn.Module,
        training: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """What `loss_func` returns, where the U-Net has ranks of its own; they answer later."""
        # Bad targets come off it when the score ranks have answered.
        count = torch.full((), len(condition), dtype=torch.int, device=condition.device)
        loss, reported = remote_score.loss(
            condition,
            batch["stream_positions"],
            batch["replacements"],
            get_model_config(model).grad_scale_func(torch.ones_like(count).float()),
            torch_dtype(self.config.training.precision),
            is_heldout=not training,
        )
        return loss, count, {"loss": reported}

    def initial_weights(self) -> InitialWeights | None:
        """The model of `align` without N; or of `pretrain`, when asked, with a new AlignerNet."""
        new = ADAPTERS if self.config.lora.rank else ()
        load_stage = self.config.checkpoint.load_stage
        path = cast(str, self.config.checkpoint.load)  # a setting that the stage needs (facts.py)
        if load_stage == "pretrain":
            return InitialWeights(path, stage="pretrain", absent=("aligner_m",), new=new)
        if load_stage == "instruct":
            return InitialWeights(path, stage="instruct", new=new)
        return InitialWeights(path, stage="align", unused=("aligner_n",), new=new)

    def probe(self, model: Sequence[nn.Module], iteration: int) -> Probe | None:
        """Images of fixed held-out prompts, and what the evaluators say of them when it is time.

        Nothing where the run has no held-out data.
        """
        if not self.config.data.heldout:
            return Probe()
        every, num_measured = self.config.evaluation.every, None
        if every:
            is_last = iteration == self.config.training.train_iters
            is_time = is_last or iteration % every == 0
            num_measured = self.config.evaluation.num_prompts if is_time else 0
        return held_out_images(
            self.config,
            self._context,
            self._generate,
            open_stream(self.config, self._context.device, "heldout", "all", True),
            model,
            self._evaluators,
            num_measured,
        )

    def _generate(
        self, condition: torch.Tensor, positions: torch.Tensor, size: int
    ) -> torch.Tensor | None:
        if self.remote_score is not None:
            condition = condition.to(torch_dtype(self.config.training.precision))
            return self.remote_score.generate(condition, positions, size)
        assert self._diffusion is not None, "the last pipeline stage alone draws"
        return generate_images(self.config, self._diffusion, condition, positions, size)

    def flops_per_iteration(self, num_tokens: int, num_images: int, num_targets: int) -> float:
        return instruct_flops(self.config, num_tokens, num_images, num_targets)
