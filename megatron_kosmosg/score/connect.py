"""How decoder ranks and score ranks find each other; whoever trains opens the links."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import RankPlace, WorldLayout, world_layout
from megatron_kosmosg.launcher import find_place
from megatron_kosmosg.parallel.layout import Layout
from megatron_kosmosg.parallel.platform import join
from megatron_kosmosg.score.link import DECODER, SCORE, Link
from megatron_kosmosg.score.remote import RemoteScore

_REQUEST_TIMEOUT = timedelta(days=1)


def open_remote_score(config: RunConfig, layout: Layout) -> RemoteScore | None:
    """The replica's score ranks as this rank sees them; None on ranks that do not compute the loss,
    and where the U-Net sits beside the decoder. Close it when training ends."""
    if not layout.num_score_ranks or not layout.is_last_stage:
        return None
    place = find_place()
    world = world_layout(config, place.world_size)
    links = open_links(config, world, world.place(place.rank), layout.store, layout.device)
    return RemoteScore(
        links,
        config.score.ranks_per_replica,
        num_microbatches(config, layout.dp_size),
        layout.tp_group,
        layout.device,
    )


@dataclass(frozen=True)
class ScoreRank:
    """What a rank that holds the U-Net alone knows of the run."""

    device: torch.device
    world: WorldLayout
    place: RankPlace
    links: tuple[Link, ...]
    """To the replicas it serves, in order."""


def join_as_score_rank(config: RunConfig) -> ScoreRank:
    """This score rank's place and its links; torch.distributed's world does not have it."""
    joined = join(config)
    links = open_links(config, joined.world, joined.place, joined.store, joined.device)
    return ScoreRank(joined.device, joined.world, joined.place, tuple(links))


def open_links(
    config: RunConfig, world: WorldLayout, place: RankPlace, store: Store, device: torch.device
) -> list[Link]:
    """This rank's links. A decoder rank's: to its score ranks, in the order of micro-batches; none
    unless it is tensor rank 0 of the last stage. A score rank's: to the replicas it serves."""
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    most = most_rows(config)

    def link(replica: int, score_index: int, end: int) -> Link:
        name = f"score link {replica}-{score_index}"
        # Between requests lie evaluations, saves and data builds of any length; a decoder rank
        # that is gone closes the connection, and the launcher ends the job.
        patience = _REQUEST_TIMEOUT if end == SCORE else timeout
        requests = _pair(PrefixStore(f"{name} requests", store), end, device, patience)
        answers = _pair(PrefixStore(f"{name} answers", store), end, device, timeout)
        score_rank = world.score_ranks(replica)[score_index]
        decoder_rank = world.decoder_rank(replica, world.pp_size - 1, 0)
        peer = f"score rank {score_rank}" if end == DECODER else f"decoder rank {decoder_rank}"
        opened = Link(requests, answers, device, most, peer)
        opened.greet(end)
        return opened

    if place.role == "score":
        replicas = range(place.replica, place.replica + world.replicas_per_unit)
        return [link(replica, place.score_index, SCORE) for replica in replicas]
    if place.tp_rank != 0 or place.pp_rank != world.pp_size - 1:
        return []
    return [link(place.replica, index, DECODER) for index in range(world.score_ranks_per_unit)]


def most_rows(config: RunConfig) -> int:
    """Upper bound of the positions in a request, which both ends of a link reckon with."""
    return max(config.training.micro_batch_size, config.logging.num_images)


def _pair(store: Store, rank: int, device: torch.device, timeout: timedelta) -> ProcessGroup:
    """A group of two ranks outside torch.distributed's world, which has decoder ranks only."""
    if device.type == "cpu":
        return ProcessGroupGloo(store, rank, 2, timeout)
    from torch.distributed import ProcessGroupNCCL  # absent from builds without CUDA

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, 2, options)
