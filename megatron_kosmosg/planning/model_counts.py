"""How many parameters each part of a stage has, and each rank of a layout: from the real modules.

The stage builds its own model on the meta device, so what is frozen is what training freezes.
`count_model` spreads the whole model over the ranks by arithmetic; `build_shards` builds the shard
of one rank of every kind inside a pretended world. Vocabulary padding and the tied copy of the
embedding are left out of the totals.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

import torch

from megatron_kosmosg.config.rank_grid import RankGrid, has_score_ranks, single_process_config
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusion_flops import clip_text_shape, diffusion_parameters
from megatron_kosmosg.models.multimodal_lm import padded_vocab_size
from megatron_kosmosg.models.pipeline_stage_specs import PipelineStageSpec, pipeline_stage_specs
from megatron_kosmosg.parallel.context import ParallelContext, single_process_context
from megatron_kosmosg.parallel.fake_world import pretend_rank
from megatron_kosmosg.planning.activations import ELEMENT_BYTES
from megatron_kosmosg.stages import build_stage, stage_facts
from megatron_kosmosg.training.stage import Stage


@dataclass(frozen=True)
class ModelPart:
    """The parameters of one module of the stage."""

    trainable: int
    frozen: int


@dataclass(frozen=True)
class RankCount:
    """Parameters that one rank of a pipeline stage holds in memory."""

    trainable: int
    frozen: int
    gradient_elements: int
    """Of the gradient buffer, in which each trained tensor starts at a multiple of 64."""
    holds: str
    """What they are, in words."""


@dataclass(frozen=True)
class ModelShares:
    """The parameters of every rank of a layout, without the frozen helpers."""

    specs: list[PipelineStageSpec]
    """Of the pipeline stages."""
    counts: list[RankCount]
    """What each tensor-parallel rank of a pipeline rank holds (one chunk, or several)."""


@dataclass(frozen=True)
class ModelCounts:
    parts: dict[str, ModelPart]
    """Every module of the stage, frozen helpers (text encoder, U-Net, VAE) included."""
    ranks: list[RankCount]
    """One entry per pipeline rank; its tensor-parallel ranks hold equal numbers. The frozen
    helpers count with the last one, unless they have ranks of their own."""
    shares: ModelShares
    """The same without the helpers."""

    @property
    def trainable(self) -> int:
        return sum(part.trainable for part in self.parts.values())

    @property
    def frozen(self) -> int:
        return sum(part.frozen for part in self.parts.values())


def count_model(config: RunConfig) -> ModelCounts:
    """The counts of the stage and layout in `config`; allocates nothing, reads at most configs."""
    model = whole_model(config)
    parts: dict[str, ModelPart] = {}
    for name, child in model.named_children():
        trainable, frozen = trained_and_frozen(child)
        if trainable + frozen:
            parts[name] = ModelPart(trainable, frozen)
    rows, width = model.get_parameter("embedding.word_embeddings.weight").shape
    padding = (rows - config.model.vocab_size) * width
    is_trained = parts["embedding"].trainable > 0
    parts["embedding"] = ModelPart(
        parts["embedding"].trainable - padding * is_trained,
        parts["embedding"].frozen - padding * (not is_trained),
    )
    helpers = frozen_helpers(config)
    parts.update({name: ModelPart(0, count) for name, count in helpers.items()})
    shares = model_shares(config, model)
    *before, last = shares.counts
    if not has_score_ranks(config):
        last = dataclasses.replace(last, frozen=last.frozen + sum(helpers.values()))
    return ModelCounts(parts, [*before, last], shares)


def whole_model(config: RunConfig) -> torch.nn.Module:
    """The stage's model on one rank, on the meta device, frozen as in training."""
    context = single_process_context(torch.device("meta"))
    (model,) = bare_stage(single_process_config(config), context).build_model(context)
    return model


def trained_and_frozen(module: torch.nn.Module) -> tuple[int, int]:
    """(number of parameters that train, number of those that do not)."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters() if not p.requires_grad)


def bare_stage(config: RunConfig, context: ParallelContext | None = None) -> Stage:
    """The stage without its frozen helpers: those are read on the last pipeline stage, and this
    object stands on another one."""
    context = context or single_process_context(torch.device("meta"))
    return build_stage(config, dataclasses.replace(context, pp_rank=0, pp_size=2))


def frozen_helpers(config: RunConfig) -> dict[str, int]:
    """Parameters of the frozen networks beside the model, by name."""
    facts = stage_facts(config.stage)
    if facts.has_text_encoder:
        return {"clip_text": clip_text_shape(config.model.clip_text.path).num_parameters}
    if facts.has_unet:
        return diffusion_parameters(config.model.diffusion.path)
    return {}


def model_shares(config: RunConfig, model: torch.nn.Module) -> ModelShares:
    """The share of `model` (whole_model) that each pipeline and tensor rank of `config` holds."""
    facts = stage_facts(config.stage)
    specs = pipeline_stage_specs(config, facts.aligner_parts)
    tp_size = config.parallel.tensor_model_parallel_size
    vocabulary = padded_vocab_size(config.model.vocab_size, tp_size) // tp_size
    width = config.model.decoder.hidden_size
    num_ranks = config.parallel.pipeline_model_parallel_size
    held: list[defaultdict[bool, int]] = [defaultdict(int) for _ in range(num_ranks)]
    buffers = [0] * num_ranks
    for name, parameter in model.named_parameters():
        owners = [_pipeline_stage(name, specs)]
        if name.endswith("word_embeddings.weight"):
            numel = vocabulary * width
            if facts.has_output_head and num_ranks > 1:
                owners.append(len(specs) - 1)  # the output head's tied copy
        else:
            numel = parameter.numel() // (tp_size if _is_split(parameter) else 1)
        for owner in owners:
            index = owner % num_ranks
            held[index][parameter.requires_grad] += numel
            buffers[index] += -(-numel // 64) * 64 * parameter.requires_grad
    counts = [
        RankCount(
            count[True],
            count[False],
            buffers[index],
            "; ".join(
                _describe(config, specs, chunk) for chunk in range(index, len(specs), num_ranks)
            ),
        )
        for index, count in enumerate(held)
    ]
    return ModelShares(specs, counts)


def _is_split(parameter: torch.nn.Parameter) -> bool:
    """Whether tensor-parallel ranks hold slices; Megatron-Core marks only its own modules."""
    return getattr(parameter, "tensor_model_parallel", False)


def _pipeline_stage(name: str, specs: list[PipelineStageSpec]) -> int:
    if name.startswith("decoder.layers."):
        layer = int(name.split(".")[2])
        return max(i for i, spec in enumerate(specs) if spec.first_decoder_layer <= layer)
    if name.startswith("decoder."):
        return next(i for i, spec in enumerate(specs) if spec.ends_decoder)
    for part in ("M", "N"):
        if name.startswith(f"aligner_{part.lower()}."):
            return next(i for i, spec in enumerate(specs) if part in spec.aligner_parts)
    return 0


def _describe(config: RunConfig, specs: list[PipelineStageSpec], index: int) -> str:
    spec, facts = specs[index], stage_facts(config.stage)
    parts = ["image tower, resampler, embedding"] if index == 0 else []
    if spec.num_decoder_layers:
        first, last_layer = spec.first_decoder_layer, spec.num_decoder_layers - 1
        several = f"layers {first}-{first + last_layer}"
        parts.append(f"decoder {several if last_layer else f'layer {first}'}")
    parts += [f"AlignerNet {part}" for part in spec.aligner_parts]
    if index == len(specs) - 1:
        beside = {
            "output head": facts.has_output_head,
            "CLIP text encoder": facts.has_text_encoder,
            "U-Net and VAE": facts.has_unet and not has_score_ranks(config),
        }
        parts += [name for name, is_there in beside.items() if is_there]
    return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class BuiltShard:
    """Parameters of one rank, counted on its modules."""

    kind: str
    """As in `estimate.RankKind.name`."""
    rank: int
    trainable: int
    frozen: int
    parameter_bytes: int
    """In the training precision."""
    groups: dict[str, list[int]]
    """The ranks of its tensor, pipeline and data group."""


def build_shards(config: RunConfig, world: RankGrid) -> list[BuiltShard]:
    """The shard of the first rank of every kind, U-Net and VAE only where they have own ranks."""
    element = ELEMENT_BYTES[config.training.precision]
    shards = []
    for pipeline_stage in range(world.pp_size):
        rank = world.decoder_rank(0, pipeline_stage, 0)
        trainable, frozen = _count(config, world, rank)
        name = f"decoder_stage_{pipeline_stage}" if world.pp_size > 1 else "decoder"
        groups = {
            "tensor": world.tensor_group(0, pipeline_stage),
            "pipeline": world.pipeline_group(0, 0),
            "data": world.data_group(pipeline_stage, 0),
        }
        shards.append(
            BuiltShard(name, rank, trainable, frozen, (trainable + frozen) * element, groups)
        )
    if world.score_ranks_per_unit:
        frozen = sum(diffusion_parameters(config.model.diffusion.path).values())
        first = world.score_ranks(0)[0]
        groups = {"serves": [world.decoder_rank(r, world.pp_size - 1, 0)
                             for r in range(world.replicas_per_unit)]}  # fmt: skip
        shards.append(BuiltShard("score", first, 0, frozen, frozen * element, groups))
    return shards


def _count(config: RunConfig, world: RankGrid, rank: int) -> tuple[int, int]:
    with pretend_rank(world, rank) as context:
        stage = bare_stage(config, context)
        parameters = [p for chunk in stage.build_model(context) for p in chunk.parameters()]
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    return trainable, frozen
