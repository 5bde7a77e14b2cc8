"""Bytes that one rank sends per update, by group, and the seconds they take where they are exposed.

Wire bytes of ring algorithms: gathering or scattering a tensor of V bytes over t ranks sends
V (t - 1) / t, summing it twice that. The batch's own distribution and scalars are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.pipeline_stage_specs import PipelineStageSpec
from megatron_kosmosg.planning.activations import ELEMENT_BYTES
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.model_counts import RankCount
from megatron_kosmosg.planning.workload import MicroBatch
from megatron_kosmosg.stages import stage_facts

_FP32 = 4
_LEAST_BUCKET, _BUCKET_A_REPLICA = 40_000_000, 1_000_000
"""Gradient elements in a bucket of Megatron-Core: at least, and for every replica."""


@dataclass(frozen=True)
class Traffic:
    """How much one rank sends, and in how many messages."""

    sent: float = 0.0
    """Bytes."""
    messages: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.messages + other.messages)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.sent * times, self.messages * times)

    def seconds(self, gb_s: float, efficiency: Efficiency, ranks: int = 2) -> float:
        """Time over a wire of `gb_s` GB/s; a message among many `ranks` passes through a tree."""
        wire = self.sent / (gb_s * 1e9 * efficiency.bandwidth)
        hops = max(1.0, math.log2(ranks))
        return wire + self.messages * hops * efficiency.collective_us * 1e-6


def tensor_traffic(
    config: RunConfig, spec: PipelineStageSpec, is_last: bool, batch: MicroBatch
) -> tuple[Traffic, Traffic]:
    """The traffic of one micro-batch within the tensor-parallel group, as (forward, backward)."""
    parallel, facts = config.parallel, stage_facts(config.stage)
    tp = parallel.tensor_model_parallel_size
    if tp == 1:
        return Traffic(), Traffic()
    share = (tp - 1) / tp
    element = ELEMENT_BYTES[config.training.precision]
    residual = batch.positions * config.model.decoder.hidden_size * element
    layers = spec.num_decoder_layers
    # Two sub-norms a layer: mean and deviation of every position forward, two sums backward.
    norm_forward = Traffic(2 * 2 * _FP32 * batch.positions * (tp - 1), 2)
    norm_backward = Traffic(2 * 2 * 2 * _FP32 * batch.positions * share, 2)
    if parallel.sequence_parallel:
        forward = Traffic(4 * residual * share, 4)  # gather and scatter around both blocks
        backward = Traffic(6 * residual * share, 6)  # and gather once more for weight gradients
    else:
        forward = backward = Traffic(4 * residual * share, 2)  # two sums
    ahead, back = (forward + norm_forward) * layers, (backward + norm_backward) * layers
    if not facts.trains_decoder:
        back = Traffic()
    if spec.ends_decoder and parallel.sequence_parallel:
        ahead += Traffic(residual * share, 1)
    aligner = config.model.aligner
    queries = batch.rows * aligner.num_queries
    width = aligner.hidden_size * element
    for _ in spec.aligner_parts:
        # Encoder: two sums a layer over the prompt; decoder: three over the queries.
        rows = aligner.num_layers * (
            2 * batch.positions * (aligner.kind == "full") + 3 * queries * (aligner.kind != "none")
        )
        sums = Traffic(2 * rows * width * share, 5 * aligner.num_layers)
        ahead, back = ahead + sums, back + sums
    if is_last and facts.has_output_head:
        back += Traffic(2 * residual * share, 1)
    if config.training.recompute == "full" and facts.trains_decoder:
        back += ahead
    return ahead, back


def boundary_traffic(config: RunConfig, world: RankGrid, batch: MicroBatch) -> Traffic:
    """The traffic of one hand-over between pipeline stages, in one direction."""
    if world.pp_size == 1:
        return Traffic()
    element = ELEMENT_BYTES[config.training.precision]
    split = world.tp_size if config.parallel.sequence_parallel else 1
    return Traffic(batch.positions * config.model.decoder.hidden_size * element / split, 1)


def data_traffic(config: RunConfig, world: RankGrid, count: RankCount) -> tuple[Traffic, Traffic]:
    """The traffic of one update within the data-parallel group, as (gradients, parameters)."""
    share = (world.num_replicas - 1) / world.num_replicas
    gradients = count.gradient_elements * _FP32 * share
    if not share:
        return Traffic(), Traffic()
    if not config.parallel.use_distributed_optimizer:
        return Traffic(2 * gradients, 1), Traffic()
    element = ELEMENT_BYTES[config.training.precision]
    return Traffic(gradients, 1), Traffic(count.gradient_elements * element * share, 1)


def bucket_elements(
    config: RunConfig, world: RankGrid, elements: float, *, is_first: bool
) -> float:
    """How many of a rank's `elements` of gradients its replicas exchange at once.

    Megatron-Core splits them only where the exchange overlaps with the backward pass, and only on
    the first pipeline stage (`is_first`), behind whose exchange nobody else has work.
    """
    if not config.parallel.overlap_grad_reduce or not is_first:
        return elements
    return min(elements, max(_LEAST_BUCKET, _BUCKET_A_REPLICA * world.num_replicas))


def score_link_traffic(config: RunConfig, images: float) -> Traffic:
    """A micro-batch's condition to a dedicated score rank and its float32 gradient back."""
    numbers = images * config.model.aligner.num_queries * config.model.aligner.hidden_size
    return Traffic(numbers * (ELEMENT_BYTES[config.training.precision] + _FP32), 2)


def score_link_seconds(
    config: RunConfig, images: float, gb_s: float, efficiency: Efficiency
) -> float:
    """There and back, over a wire of `gb_s` GB/s; hosts encrypt, send and check no faster than
    `score_link_gb_s`."""
    slowest = min(gb_s, efficiency.score_link_gb_s / efficiency.bandwidth)
    return score_link_traffic(config, images).seconds(slowest, efficiency)


def data_gb_s(world: RankGrid, gpu: Gpu, pp_rank: int) -> float:
    """GB/s of a data-parallel group: inside a node the link, else its members' adapters."""
    group = world.data_group(pp_rank, 0)
    node = group[0] // gpu.per_node
    beside = sum(rank // gpu.per_node == node for rank in group)
    if beside == len(group):
        return gpu.link_gb_s
    return min(gpu.link_gb_s, gpu.network_gb_s * beside)


def group_gb_s(ranks: list[int], gpu: Gpu) -> float:
    """GB/s between the ranks of a group: the link when one node holds them."""
    nodes = {rank // gpu.per_node for rank in ranks}
    return gpu.link_gb_s if len(nodes) == 1 else gpu.network_gb_s
