"""Which device and backend a run uses, and what has to be set up before a model can be built.

CUDA with NCCL where there is a GPU, otherwise the CPU with gloo and the shim of `cpu_shim.py`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from datetime import timedelta

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.parallel import cpu_shim, fused_adam
from megatron_kosmosg.parallel.cpu_shim_selftest import run_self_test
from megatron_kosmosg.parallel.devices import choose_device, collective_backend
from megatron_kosmosg.parallel.layout import Layout, create_groups, destroy_groups
from megatron_kosmosg.parallel.rendezvous import find_place, meet
from megatron_kosmosg.parallel.seeds import set_seeds

logger = logging.getLogger(__name__)
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def initialize(config: RunConfig) -> Layout:
    """This rank's layout, with groups, seeds and (on a CPU) the shim in place.

    Ranks come from torchrun or Slurm; without either the process runs alone. Pair it with
    `teardown`, also after an error.
    """
    place = find_place(os.environ)
    chosen = choose_device(place)
    prepare_megatron(chosen)
    meet(place, collective_backend(chosen), timedelta(seconds=config.parallel.timeout_seconds))
    layout = create_groups(config, chosen)
    set_seeds(config.training.seed, layout)
    if layout.rank == 0:
        logger.info(
            "%d ranks on %s (tensor %d x pipeline %d x data %d), %s layers, %s Adam",
            layout.world_size,
            chosen.type,
            layout.tp_size,
            layout.pp_size,
            layout.dp_size,
            transformer_impl(),
            fused_adam.install(),
        )
    return layout


def prepare_megatron(chosen: torch.device) -> None:
    """Fit Megatron-Core to this process's device: the shim on a CPU, a fused-layout optimizer."""
    if chosen.type == "cpu":
        cpu_shim.install()
        run_self_test()
    fused_adam.install()


def teardown() -> None:
    """Leave the process groups; harmless when there are none. Never waits for other ranks."""
    if torch.distributed.is_initialized():
        destroy_groups()
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """The device of this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def torch_dtype(precision: str) -> torch.dtype:
    """The dtype of `training.precision`."""
    return _PRECISIONS[precision]


def transformer_flags() -> dict[str, bool]:
    """Fusion switches of Megatron-Core's TransformerConfig for this device.

    Off on a CPU, where a fused function is a torch.compile of 10-20 seconds. Its fused bias+GELU is
    the tanh approximation and therefore off everywhere.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "bias_activation_fusion": False,
        "bias_dropout_fusion": on_gpu,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": on_gpu and has_gradient_accumulation_fusion(),
    }


def has_gradient_accumulation_fusion() -> bool:
    """Whether NVIDIA apex was built with its fused weight-gradient kernel."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def transformer_impl() -> str:
    """ "transformer_engine" where it imports on a GPU, else "local"."""
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    return "transformer_engine" if has_engine and torch.cuda.is_available() else "local"
