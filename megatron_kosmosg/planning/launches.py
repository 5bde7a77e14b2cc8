"""How many kernels a pass launches: with few rows the GPU waits for the host that launches them.

The counts are rehearsed, with Megatron-Core's own layers in bf16 (`kosmosg rehearse`;
tests/rehearsal holds them against today's code). TransformerEngine's fused layers launch fewer.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.pipeline_stage_specs import PipelineStageSpec
from megatron_kosmosg.planning.communication import bucket_elements
from megatron_kosmosg.stages import stage_facts


class Launches(NamedTuple):
    """The numbers of kernels that the passes of one micro-batch launch."""

    forward: float
    backward: float


DECODER_LAYER, SPLIT_DECODER_LAYER = Launches(14, 39), Launches(60, 73)
"""Alone, and shared by tensor ranks with sequence parallelism, exchanges counted."""
ALIGNER_LAYER, SPLIT_ALIGNER_LAYER = Launches(32, 97), Launches(127, 168)
"""Of either half of AlignerNet."""
IMAGE_BLOCK = Launches(14, 0)
UNET = Launches(673, 695)
"""Stable Diffusion v1.5's, from the noisy latents to the loss and back to the condition."""
VAE_ENCODER = Launches(106, 0)
TEXT_ENCODER_LAYER = Launches(19, 0)
ENDS = {
    "pretrain": Launches(73, 116),
    "align": Launches(35, 47),
    "instruct": Launches(92, 134),
}
"""Embeddings, resampler, final norms, output head, loss; half of them on the first pipeline stage
and half on the last."""
RECORDED = 4
"""A pass that is one CUDA graph: its inputs' copies and the graph."""
UPDATE = 30
"""Norm, learning rate, loss scale and sums."""
UPDATE_DECODER_LAYER, UPDATE_ALIGNER_LAYER = 16, 40
"""Copies between a parameter and its float32 copy, less where replicas share the optimizer."""
UPDATE_SPLIT_LAYER = 5
"""Sums of the norms' gradients over tensor ranks, of a decoder layer."""
MOST_PIECES, PIECE_ELEMENTS = 6, 1e6
"""Parameters, and parts of them, of which the first replica's share of a bucket of gradients
consists, each a copy more: one and one for every million elements, up to six. Rehearsed with 4, 8
and 128 replicas."""


def launches(config: RunConfig, spec: PipelineStageSpec, is_last: bool, images: float) -> Launches:
    """The kernels of a pipeline stage, without those of the frozen U-Net."""
    is_first = spec.first_decoder_layer == 0
    facts = stage_facts(config.stage)
    split = config.parallel.tensor_model_parallel_size > 1
    decoder = SPLIT_DECODER_LAYER if split else DECODER_LAYER
    aligner = SPLIT_ALIGNER_LAYER if split else ALIGNER_LAYER
    again = config.training.recompute == "full"
    stacks = [(spec.num_decoder_layers, decoder, facts.trains_decoder)]
    stacks += [(config.model.aligner.num_layers, aligner, True)] * len(spec.aligner_parts)
    ends = (is_first + is_last) / 2
    forward, backward = (ends * kernels for kernels in ENDS[config.stage])
    for layers, layer, is_trained in stacks:
        forward += layers * layer.forward
        if is_trained:
            backward += layers * (layer.backward + again * layer.forward)
    if is_first and images:
        forward += config.model.vision.num_layers * IMAGE_BLOCK.forward
    if is_last and facts.has_text_encoder:
        forward += 12 * TEXT_ENCODER_LAYER.forward
    return Launches(forward, backward)


def score_launches(config: RunConfig) -> Launches:
    """The kernels of the frozen U-Net, and of the VAE's encoder unless its moments are cached."""
    recorded = config.performance.compile == "cudagraph"
    forward, backward = (RECORDED, RECORDED) if recorded else UNET
    encoder = RECORDED if recorded else VAE_ENCODER.forward
    cached = config.data.latent_cache is not None
    again = config.score.recompute * forward
    return Launches(forward + (0 if cached else encoder), backward + again)


def update_launches(
    config: RunConfig, world: RankGrid, spec: PipelineStageSpec, elements: float
) -> float:
    """The kernels of the optimizer's step on a rank of a pipeline stage that updates `elements`
    gradient elements."""
    sharing = world.num_replicas if config.parallel.use_distributed_optimizer else 1
    trained = stage_facts(config.stage).trains_decoder * spec.num_decoder_layers
    copies = UPDATE_DECODER_LAYER * trained
    copies += UPDATE_ALIGNER_LAYER * config.model.aligner.num_layers * len(spec.aligner_parts)
    is_first = spec.first_decoder_layer == 0
    bucket = bucket_elements(config, world, elements, is_first=is_first)
    pieces_of_one = min(MOST_PIECES, 1 + bucket / sharing / PIECE_ELEMENTS)
    buckets = pieces_of_one * elements / bucket if elements else 0.0
    split = config.parallel.tensor_model_parallel_size > 1
    sums = UPDATE_SPLIT_LAYER * trained * split
    return UPDATE + sums + copies / sharing + buckets * (1 - 1 / sharing)
