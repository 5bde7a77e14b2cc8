"""Bytes that one micro-batch keeps for its backward pass on a rank of each pipeline stage.

Read off the modules: each term is a tensor that autograd saves in the project's layers (unfused
GELU, sub-norms, attention that never holds its matrix). The tests compare the sums with
the bytes that a memory tracker sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.losses import ELEMENTS_AT_ONCE
from megatron_kosmosg.models.multimodal_lm import padded_vocab_size
from megatron_kosmosg.models.pipeline_stage_specs import PipelineStageSpec
from megatron_kosmosg.planning.workload import MicroBatch
from megatron_kosmosg.stages import stage_facts

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4


@dataclass(frozen=True)
class StageActivations:
    """The bytes that are kept on one rank for the backward pass of a micro-batch."""

    saved: float
    """Of each micro-batch between its forward and its backward."""
    passing: float
    """Largest that comes and goes with one micro-batch: the output head's logits, or a layer's
    gradients and recomputed tensors; the head's backward is over when the layers' begins."""
    ahead: float = 0.0
    """Of the micro-batch whose images are encoded before a wait for score ranks."""


@dataclass(frozen=True)
class _Stack:
    """Sizes of a stack of layers, and how its activations are split."""

    num_layers: int
    width: int
    ffn_width: int
    heads: int
    tp: int
    element: int
    sequence_parallel: bool = False
    dropout: bool = False

    def self_attention(self, positions: float) -> float:
        """Norm, projections, attention and its residual."""
        outer = positions / (self.tp if self.sequence_parallel else 1)
        inner = positions / self.tp
        kept = 2 * outer * self.width  # residual, normed
        kept += (3 + 1 + 1) * inner * self.width  # q k v, context, sub-normed
        if self.tp > 1:
            kept += inner * self.width  # the split sub-norm keeps what it normed
        mask = outer * self.width if self.dropout else 0
        return kept * self.element + mask + inner / self.width * self.heads * _FP32

    def feed_forward(self, positions: float) -> float:
        """Bytes of the feed-forward block: norm, both linears and their residual."""
        outer = positions / (self.tp if self.sequence_parallel else 1)
        inner = positions / self.tp * self.ffn_width
        kept = 2 * outer * self.width * self.element  # residual, normed
        # GELU's input, the sub-norm's (or what it normed), its output.
        kept += 3 * inner * self.element
        return kept + (outer * self.width if self.dropout else 0)

    def cross_attention(self, queries: float, keys: float) -> float:
        """Norm, projections, attention over `keys`, without a sub-norm."""
        kept = 2 * queries * self.width  # residual, normed
        kept += (2 * queries + 2 * keys) / self.tp * self.width  # q, context; k, v
        return kept * self.element

    def layer(self, positions: float) -> float:
        """Bytes of one layer without cross-attention."""
        return self.self_attention(positions) + self.feed_forward(positions)

    def encoder(self, positions: float, recompute: bool) -> float:
        """Bytes of all layers and the final norm."""
        return self._stacked(self.layer(positions), positions, recompute)

    def decoder(self, queries: float, keys: float, recompute: bool) -> float:
        """All layers with cross-attention, the final norm and what they attend to."""
        layer = self.layer(queries) + self.cross_attention(queries, keys)
        return self._stacked(layer, queries, recompute) + keys * self.width * self.element

    def _stacked(self, layer: float, positions: float, recompute: bool) -> float:
        outer = positions / (self.tp if self.sequence_parallel else 1) * self.width * self.element
        return self.num_layers * (outer if recompute else layer) + 2 * outer

    def passing(self, positions: float, recompute: bool) -> float:
        """Largest set of gradients within one layer, those of the feed-forward, and the layer's
        own tensors where they are recomputed."""
        inner = positions / self.tp * self.ffn_width
        gradients = 2 * inner * self.element + 2 * positions * self.width * self.element
        return gradients + (self.layer(positions) if recompute else 0)


def pipeline_stage_activations(
    config: RunConfig, spec: PipelineStageSpec, is_last: bool, batch: MicroBatch
) -> StageActivations:
    """The activations of one pipeline stage, without those of the frozen U-Net."""
    element = ELEMENT_BYTES[config.training.precision]
    recompute = config.training.recompute == "full"
    decoder, aligner = _decoder(config, spec, element), _aligner(config, element)
    facts = stage_facts(config.stage)
    saved, passing, ahead = 0.0, 0.0, 0.0
    if facts.trains_decoder and spec.first_decoder_layer == 0 and batch.prompt_images:
        saved += _image_tower(config, batch.prompt_images, element)
        is_interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
        if config.score.placement == "dedicated" and not is_interleaved:
            ahead = _encoded_ahead(config, batch.prompt_images, element)
    if spec.num_decoder_layers:
        held = decoder.encoder(batch.positions, recompute)
        saved += held if facts.trains_decoder else 0
        passing = decoder.passing(batch.positions, recompute) if facts.trains_decoder else 0
    queries = batch.rows * config.model.aligner.num_queries
    variants = {"M": (batch.positions, queries), "N": (queries, batch.positions)}
    for part in spec.aligner_parts:
        before, after = variants[part]
        saved += batch.positions * config.model.decoder.hidden_size * element
        if config.model.aligner.kind == "none":
            continue
        keys_length, query_length = before, after
        saved += aligner.decoder(query_length, keys_length, recompute)
        if config.model.aligner.kind == "full":
            saved += aligner.encoder(batch.positions, recompute)
        passing = max(passing, aligner.passing(batch.positions, recompute))
    if is_last and facts.has_output_head:
        tp = config.parallel.tensor_model_parallel_size
        tokens = padded_vocab_size(config.model.vocab_size, tp) / tp
        logits = batch.positions * tokens
        # Their gradient takes the logits' place; beside it are some in float32, then the head's.
        in_fp32 = 0 if element == _FP32 else min(logits, ELEMENTS_AT_ONCE) * _FP32
        of_head = config.model.decoder.hidden_size * tokens * element
        passing = max(passing, logits * element + max(in_fp32, of_head))
    return StageActivations(saved, passing, ahead)


def _decoder(config: RunConfig, spec: PipelineStageSpec, element: int) -> _Stack:
    sizes, parallel = config.model.decoder, config.parallel
    return _Stack(
        spec.num_decoder_layers,
        sizes.hidden_size,
        sizes.ffn_hidden_size,
        sizes.num_attention_heads,
        parallel.tensor_model_parallel_size,
        element,
        parallel.sequence_parallel,
        sizes.hidden_dropout > 0,
    )


def _aligner(config: RunConfig, element: int) -> _Stack:
    sizes = config.model.aligner
    return _Stack(
        sizes.num_layers,
        sizes.hidden_size,
        sizes.ffn_hidden_size,
        sizes.num_attention_heads,
        config.parallel.tensor_model_parallel_size,
        element,
    )


def _image_tower(config: RunConfig, prompt_images: float, element: int) -> float:
    """Trained blocks of the image tower, post-norm, scaling, and the resampler."""
    vision, width = config.model.vision, config.model.decoder.hidden_size
    tp = config.parallel.tensor_model_parallel_size
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    queries = config.model.resampler.num_latent_queries
    # norms, q k v, context, residual; quick GELU keeps its input, the sigmoid and its output
    block = (9 * vision.hidden_size + 3 * vision.ffn_hidden_size) * vision.num_trainable_layers
    tower = patches * (block + 4 * vision.hidden_size)
    resampler = (patches + queries) * width * (1 + 2 / tp) + queries * width * (1 + 2 / tp)
    return prompt_images * (tower + resampler) * element


def _encoded_ahead(config: RunConfig, prompt_images: float, element: int) -> float:
    """Images, and what the image tower's frozen blocks have made of them."""
    vision = config.model.vision
    if vision.num_trainable_layers == vision.num_layers:
        return 0.0
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    return prompt_images * (3 * vision.image_size**2 + patches * vision.hidden_size) * element
