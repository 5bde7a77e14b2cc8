"""How decoder ranks and score ranks find each other; whoever trains opens the links."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import zmq
from torch.distributed import PrefixStore, Store

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import to_yaml
from megatron_kosmosg.config.paths import output_folder
from megatron_kosmosg.config.rank_grid import RankCoordinates, RankGrid, rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.launcher import RankInfo, attempt, find_rank_info, node_name
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.parallel.devices import hardware_name
from megatron_kosmosg.parallel.platform import join, torch_dtype
from megatron_kosmosg.score.fleet import Fleet, Patience
from megatron_kosmosg.score.member import DecoderAddress, Membership
from megatron_kosmosg.score.remote import RemoteScore
from megatron_kosmosg.score.roster import Standing
from megatron_kosmosg.score.run_file import RunAddress, config_hash, find, publish, withdraw
from megatron_kosmosg.score.wire import Limits

_LOOPBACK = "127.0.0.1"
_LOADING_SHARE = 0.75
"""Of the time that ranks wait for each other: what score ranks may take to load."""
_SEEN_EVERYWHERE = 60.0
"""Seconds in which a file server shows a new file to all nodes."""


def open_remote_score(config: RunConfig, context: ParallelContext) -> RemoteScore | None:
    """The replica's score ranks as this rank sees them; None on ranks that do not compute the loss,
    and where the U-Net sits beside the decoder. Close it when training ends."""
    if not context.num_score_ranks or not context.is_last_pipeline_stage:
        return None
    return RemoteScore(
        open_fleet(config, context) if context.tp_rank == 0 else None,
        config.score.ranks_per_replica,
        num_microbatches(config, context.dp_size),
        context.process_groups.tp,
        context.device,
    )


def open_fleet(config: RunConfig, context: ParallelContext) -> Fleet:
    """This decoder rank's end of the links, open where score ranks find it; collective over the
    decoder ranks that ask score ranks."""
    rank_info = find_rank_info()
    world = rank_grid(config, rank_info.world_size)
    replica = world.coordinates(rank_info.rank).replica
    host = listening_host(config, rank_info)
    public, secret = zmq.curve_keypair()
    fleet = Fleet(
        host, (public, secret), limits(config), patience(config), config.score.audit_rate, replica
    )
    store = _store(context.store, config)
    address = DecoderAddress(replica, f"tcp://{host}:{fleet.port}", public.decode())
    store.set(f"decoder {replica}", json.dumps(vars(address)))
    fleet.publish = lambda answered: store.set(_answered(replica), json.dumps(answered))
    fleet.publish_answered()
    if replica == 0:
        guests_public, guests_secret = (key.decode() for key in zmq.curve_keypair())
        decoders = [json.loads(store.get(f"decoder {r}")) for r in range(world.num_replicas)]
        start = secrets.token_hex(8)
        publish(
            output_folder(config),
            RunAddress(
                start,
                config_hash(to_yaml(config)),
                guests_public,
                guests_secret,
                tuple(DecoderAddress(**decoder) for decoder in decoders),
            ),
        )
        fleet.on_close = partial(withdraw, output_folder(config), start)
        store.set("guests", guests_public)
        store.set("start", start)
    fleet.admit(bytes(store.get("guests")))
    return fleet


def answers_by_hardware(config: RunConfig, context: ParallelContext) -> Counter[str]:
    """Answers that replicas got so far in this start, by the kind of hardware that gave them; as of
    the last iteration whose sums this rank knows."""
    keys = [_answered(replica) for replica in range(context.dp_size)]
    told = _store(context.store, config).multi_get(keys)
    return sum((Counter(json.loads(counts)) for counts in told), Counter())


def _answered(replica: int) -> str:
    return f"answered {replica}"


def limits(config: RunConfig) -> Limits:
    """The most that a message of the run can hold."""
    aligner = config.model.aligner
    return Limits(
        max(config.training.micro_batch_size, config.logging.num_images),
        (aligner.num_queries, aligner.hidden_size),
        torch_dtype(config.training.precision),
        config.data.target_image_size,
    )


def patience(config: RunConfig) -> Patience:
    """Other decoder ranks wait for this one no longer than parallel.timeout_seconds."""
    longest = config.parallel.timeout_seconds
    alone = min(config.score.wait_seconds, longest / 2)
    return Patience(config.score.answer_seconds, alone, longest * _LOADING_SHARE)


def listening_host(config: RunConfig, rank_info: RankInfo) -> str:
    """The address at which this rank listens: of the interface through which the ranks meet."""
    if config.score.listen_address is not None:
        return config.score.listen_address
    if rank_info.address is None:
        return _LOOPBACK
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((rank_info.address, rank_info.port or 1))  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(
            f"no interface leads to {rank_info.address}, where the ranks meet ({error}); set "
            "score.listen_address to this node's address in the cluster"
        ) from error


@dataclass(frozen=True)
class ScoreRank:
    """A rank that holds the U-Net alone, with its connection and what it knows of the run."""

    device: torch.device
    name: str
    membership: Membership
    world: RankGrid | None = None
    coordinates: RankCoordinates | None = None
    """Where it is a rank of the run's job."""
    start: str = ""
    """Of the run, that it works for."""


def join_as_score_rank(config: RunConfig) -> ScoreRank:
    """Connects this rank of the run's job as a score rank; torch.distributed's world does not have
    it."""
    joined = join(config)
    world, coordinates = joined.world, joined.coordinates
    store = _store(joined.store, config)
    start = bytes(store.get("start")).decode()
    served = range(coordinates.replica, coordinates.replica + world.replicas_per_unit)
    name = f"score rank {joined.rank}"
    membership = open_membership(
        config,
        _seen(config, start),
        joined.device,
        name,
        lambda replica: Standing.OWN if replica in served else Standing.RESERVE,
    )
    return ScoreRank(joined.device, name, membership, world, coordinates, start)


def join_as_guest(config: RunConfig, address: RunAddress, device: torch.device) -> ScoreRank:
    """Connects this process, which is no rank of the run's job, to the run as a score rank."""
    name = f"joined rank {node_name()}:{os.getpid()}"
    membership = open_membership(config, address, device, name, lambda _: Standing.JOINED)
    return ScoreRank(device, name, membership, start=address.start)


def open_membership(
    config: RunConfig,
    address: RunAddress,
    device: torch.device,
    name: str,
    standing: Callable[[int], Standing],
) -> Membership:
    """Connections to the decoder ranks of a run. Close it."""
    key = address.public.encode(), address.secret.encode()
    return Membership(
        address.decoders,
        key,
        limits(config),
        name,
        f"{hardware_name(device)}, {config.training.precision}",
        standing,
        silence_seconds=config.parallel.timeout_seconds,
    )


def _seen(config: RunConfig, start: str) -> RunAddress:
    deadline = time.monotonic() + _SEEN_EVERYWHERE
    while True:
        found = find(output_folder(config))
        if found is not None and found.start == start:
            return found
        if time.monotonic() > deadline:
            raise ConfigError(
                f"logging.output_dir={output_folder(config)}: what rank 0 wrote there is not seen "
                "by this score rank; it must be one folder for all nodes"
            )
        time.sleep(0.1)


def _store(store: Store | None, config: RunConfig) -> Store:
    assert store is not None
    # torchrun's store outlives ranks that it starts again; what the former ones said is stale.
    found = PrefixStore(f"score fleet {attempt()}", store)
    found.set_timeout(timedelta(seconds=config.parallel.timeout_seconds))
    return found
