"""Random streams: one shared by the tensor-parallel ranks, one of each rank's own."""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from megatron_kosmosg.parallel.context import ParallelContext

_PER_PIPELINE_STAGE = 100  # Megatron-LM's stride between pipeline stages
_PER_REPLICA = 10


def set_seeds(seed: int, context: ParallelContext) -> None:
    """Seed torch, numpy, python and Megatron's RNG tracker for this rank.

    Tensor-parallel ranks share the default stream (dropout of replicated activations) and differ in
    the tracker's (dropout of split ones). Replicas and pipeline stages differ in both, so that
    dropout is not correlated between them.
    """
    rank_seed = (
        seed
        + _PER_PIPELINE_STAGE * context.pp_rank
        + _PER_REPLICA * _PER_PIPELINE_STAGE * context.dp_rank
    )
    random.seed(rank_seed)
    np.random.seed(rank_seed % 2**32)
    torch.manual_seed(rank_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(rank_seed, force_reset_rng=True)


def rng_tracker() -> CudaRNGStatesTracker:
    """Megatron's named random streams, made at the first call. Its own function is annotated as
    giving None, which the variable that it returns starts as."""
    return cast(CudaRNGStatesTracker, tensor_parallel.get_cuda_rng_tracker())
