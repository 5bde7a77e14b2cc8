"""One rank's real model of every kind, built on the meta device inside a pretended world."""

from __future__ import annotations

import dataclasses

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import WorldLayout
from megatron_kosmosg.models.diffusion_flops import diffusion_parameters
from megatron_kosmosg.parallel.fake_world import pretend_rank
from megatron_kosmosg.planning.activations import ELEMENT_BYTES
from megatron_kosmosg.stages import build_stage


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


def build_shards(config: RunConfig, world: WorldLayout) -> list[BuiltShard]:
    """The shard of the first rank of every kind, U-Net and VAE only where they have own ranks."""
    element = ELEMENT_BYTES[config.training.precision]
    shards = []
    for stage in range(world.pp_size):
        rank = world.decoder_rank(0, stage, 0)
        trainable, frozen = _count(config, world, rank)
        name = f"decoder_stage_{stage}" if world.pp_size > 1 else "decoder"
        groups = {
            "tensor": world.tensor_group(0, stage),
            "pipeline": world.pipeline_group(0, 0),
            "data": world.data_group(stage, 0),
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


def _count(config: RunConfig, world: WorldLayout, rank: int) -> tuple[int, int]:
    with pretend_rank(world, rank) as layout:
        # Frozen helpers are read on the last stage only; this stage object stands on another one.
        stage = build_stage(config, dataclasses.replace(layout, pp_rank=0, pp_size=2))
        parameters = [p for chunk in stage.build_model(layout) for p in chunk.parameters()]
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    return trainable, frozen
