"""A process on a CPU where TransformerEngine's linears have numbers: its own Python, with the
products of `engine_kernels` for its compiled part.

usage: python -m tests.support.engine_numbers FOLDER

Writes loss and gradients of every stage into FOLDER, with each of `KINDS` of linears.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

STAGES = ("pretrain", "align", "instruct")
KINDS = ("local", "unfused", "fused")
"""Megatron-Core's own linears; TransformerEngine's, whose gradients are made and then added; the
same, adding them to the sums over micro-batches themselves."""
_ENGINE = "transformer_engine"


def main(folder: Path) -> None:
    """Writes STAGE-KIND.npz with the gradients and STAGE-KIND.json with {"loss": its sum, "calls":
    of matrix products by kind}."""
    _import_engine()
    import numpy as np

    from tests.support.stage_gradients import stage_gradients
    from tests.support.tiny_models import tiny_config, write_stable_diffusion

    calls = _answer_on_the_cpu()
    frozen = write_stable_diffusion(folder / "sd")
    for stage in STAGES:
        for kind in KINDS:
            _take(kind)
            calls.clear()
            loss, share = stage_gradients(tiny_config(stage, frozen, folder))
            np.savez(folder / f"{stage}-{kind}.npz", **share.tensors)
            said = json.dumps({"loss": loss, "calls": dict(calls)})
            (folder / f"{stage}-{kind}.json").write_text(said)


def _import_engine() -> None:
    """Imports TransformerEngine and Megatron-Core as where there is a GPU."""
    import torch

    from tests.support.engine_server import find_engine

    find_engine()
    count = torch.cuda.device_count
    torch.cuda.device_count = lambda: 1  # else the package would be hidden
    importlib.import_module("megatron.core.extensions.transformer_engine")
    torch.cuda.device_count = count


def _answer_on_the_cpu() -> Any:
    """Gives TransformerEngine's modules the view of torch that Megatron-Core's have on a CPU, and
    returns the count of its products."""
    import torch

    from megatron_kosmosg.parallel import cpu_shim, platform
    from tests.support import engine_kernels

    cpu_shim.install()
    platform.run_self_test = lambda: None  # it clips gradients, whose norm has no number here
    view: Any = cpu_shim._cpu_view()
    view.cuda.is_available = lambda: True
    view.cuda.is_current_stream_capturing = lambda: False
    view.cuda.get_device_capability = lambda device=None: (9, 0)
    view.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)
    view.cuda.nvtx = MagicMock()
    for name, module in list(sys.modules.items()):
        if name.startswith(_ENGINE) and vars(module).get("torch") is torch:
            module.torch = view

    def is_cuda(tensor: torch.Tensor) -> bool:
        return sys._getframe(1).f_globals.get("__name__", "").startswith(_ENGINE)

    torch.Tensor.is_cuda = property(is_cuda)
    engine_kernels._check_device = lambda what, tensors: None
    return engine_kernels.calls


def _take(kind: str) -> None:
    """Has models be built of these linears, and of torch's attention."""
    from megatron_kosmosg.models import layer_specs, mcore_configs
    from megatron_kosmosg.parallel import platform

    taken = layer_specs.LOCAL
    if kind != "local":
        attention = layer_specs.LOCAL.causal_attention
        engine = layer_specs.transformer_engine_provider()
        taken = dataclasses.replace(engine, causal_attention=attention)
    flags = platform.transformer_flags() | {"gradient_accumulation_fusion": kind == "fused"}
    layer_specs.provider = lambda: taken
    mcore_configs.transformer_flags = lambda fuse_weight_gradients: flags


if __name__ == "__main__":
    main(Path(sys.argv[1]))
