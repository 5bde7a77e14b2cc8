"""Which device and backend a run uses, and what has to be set up before a model can be built.

CUDA with NCCL where there is a GPU, otherwise the CPU with gloo and the shim of `cpu_shim.py`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import sysconfig
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import Store

from megatron_kosmosg.config.rank_grid import RankCoordinates, RankGrid, rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.parallel import cpu_shim, fused_adam
from megatron_kosmosg.parallel.arrivals import Arrivals
from megatron_kosmosg.parallel.context import ParallelContext, create_groups, destroy_groups
from megatron_kosmosg.parallel.cpu_shim_selftest import run_self_test
from megatron_kosmosg.parallel.devices import choose_device, collective_backend
from megatron_kosmosg.parallel.rendezvous import meet
from megatron_kosmosg.parallel.seeds import set_seeds

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""{name in `training.precision` and in the tools' `--dtype`: dtype}"""


def holds_unet_alone(config: RunConfig) -> bool:
    """Whether this rank is a score rank, which score/connect.py sets up instead of `initialize`."""
    rank_info = find_rank_info()
    return rank_grid(config, rank_info.world_size).coordinates(rank_info.rank).role == "score"


@dataclass(frozen=True)
class JoinedRank:
    """A rank of any kind that has met the others."""

    rank: int
    """Among all ranks of the run."""
    device: torch.device
    world: RankGrid
    coordinates: RankCoordinates
    store: Store


def join(config: RunConfig) -> JoinedRank:
    """Chooses this rank's device and meets all others; no process group is made."""
    rank_info = find_rank_info()
    world = rank_grid(config, rank_info.world_size)
    chosen = choose_device(rank_info)
    with Arrivals(rank_info) as arrivals:
        store = meet(rank_info, timedelta(seconds=config.parallel.timeout_seconds))
        arrivals.sign(store)
    return JoinedRank(rank_info.rank, chosen, world, world.coordinates(rank_info.rank), store)


_FUSED_ADD_GRAPHS = 32
"""Megatron-Core's fused bias-dropout-add is one function for the layers of decoder, image tower,
resampler and AlignerNet, with several widths, dtypes and lengths: evaluation needs 8 graphs."""


def initialize(config: RunConfig) -> ParallelContext:
    """Sets up this decoder rank and returns its layout: groups, seeds and (on a CPU) the shim are
    then in place.

    Ranks come from torchrun or Slurm; without either the process runs alone. Pair it with
    `teardown`, also after an error.
    """
    joined = join(config)
    chosen, world, coordinates = joined.device, joined.world, joined.coordinates
    prepare_megatron(chosen)
    number = joined.rank
    if world.num_score_ranks:  # torch.distributed's world has no score ranks: count without them
        in_replica = coordinates.pp_rank * world.tp_size + coordinates.tp_rank
        number = coordinates.replica * world.replica_size + in_replica
    torch.distributed.init_process_group(
        collective_backend(chosen),
        store=torch.distributed.PrefixStore("decoders", joined.store),
        rank=number,
        world_size=world.world_size - world.num_score_ranks,
        timeout=timedelta(seconds=config.parallel.timeout_seconds),
    )
    context = create_groups(config, chosen, world.num_score_ranks, joined.store)
    set_seeds(config.training.seed, context)
    if context.rank == 0:
        logger.info(
            "%d ranks on %s (tensor %d x pipeline %d x data %d, %d score ranks), %s layers, "
            "%s Adam, megatron-core %s",
            context.num_devices,
            chosen.type,
            context.tp_size,
            context.pp_size,
            context.dp_size,
            context.num_score_ranks,
            transformer_impl(),
            fused_adam.install(),
            importlib.metadata.version("megatron-core"),  # without the commit of this folder
        )
    return context


def prepare_megatron(chosen: torch.device) -> None:
    """Fit Megatron-Core to this process's device: the shim on a CPU, a fused-layout optimizer."""
    if chosen.type == "cpu":
        cpu_shim.install()
        run_self_test()
    else:
        allow_graphs(_FUSED_ADD_GRAPHS)
    fused_adam.install()


def allow_graphs(count: int) -> None:
    """Let torch.compile make at least `count` graphs of one function before it gives up on it.

    It then runs uncompiled, without a word. torch's own limit is 8.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, count)


def teardown() -> None:
    """Leave the process groups; harmless when there are none. Never waits for other ranks."""
    if torch.distributed.is_initialized():
        destroy_groups()
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """The device that this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def torch_dtype(precision: str) -> torch.dtype:
    """The torch dtype that `training.precision` names."""
    return DTYPES[precision]


def transformer_flags(fuse_weight_gradients: bool = True) -> dict[str, bool]:
    """Fusion switches of Megatron-Core's TransformerConfig for this device.

    Off on a CPU, where a fused function is a torch.compile of 10-20 seconds. Its fused bias+GELU is
    the tanh approximation and therefore off everywhere.

    Args:
        fuse_weight_gradients: `performance.gradient_accumulation_fusion`, heeded where the layers
            can do it: TransformerEngine's, or Megatron-Core's own with apex's kernel.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "bias_activation_fusion": False,
        "bias_dropout_fusion": on_gpu and why_no_compiler() is None,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": on_gpu
        and fuse_weight_gradients
        and (transformer_impl() == "transformer_engine" or has_fused_weight_gradient_kernel()),
    }


def why_no_compiler() -> str | None:
    """Why torch.compile cannot make a kernel for a GPU here; None where it can.

    Its Triton builds a C module of its own first, with the compiler and the headers that it finds
    as below; where one is missing, the first compiled function raises.
    """
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "there is no C compiler; to repair: install gcc, or set CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    places = [sysconfig.get_paths(scheme=scheme)["include"]]
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        places += os.environ.get(variable, "").split(os.pathsep)
    if any(place and Path(place, "Python.h").is_file() for place in places):
        return None
    return f"{places[0]} has no Python.h; to repair: install Python's headers (python3-dev)"


def has_fused_weight_gradient_kernel() -> bool:
    """Whether NVIDIA apex was built with the kernel by which Megatron-Core's own linears add weight
    gradients into their buffer. TransformerEngine's need none."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def transformer_impl() -> str:
    """The implementation of layers: "transformer_engine" where it imports on a GPU, otherwise
    "local".

    Models on the meta device (torch's default one at the moment), which are counted and never run,
    are of the local one: TransformerEngine's modules copy their weights, and there is nothing to
    copy.
    """
    is_counted = torch.get_default_device().type == "meta"
    if is_counted or not torch.cuda.is_available():
        return "local"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return "local"
    return "transformer_engine"
