"""The process with the fake GPU (`megatron_kosmosg.rehearsal.server`) where TransformerEngine is
installed: its own Python, with `engine_kernels` for its compiled part, which needs a driver.

The kernels stand in for those of 2.11 to 2.20 in the calls that this project makes. `kosmosg
rehearse` does without them: for how many launches each stands, a GPU has to show first.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from megatron_kosmosg.rehearsal import server

_ENGINE = "transformer_engine.pytorch"
_NOT_CALLED = ("triton", "triton.language", "triton.language.standard", "onnx", "onnxscript")
"""What it imports for kernels and for an export that nothing here calls: 200 MB, where they are not
installed."""


class _Finder(MetaPathFinder):
    """Asked first, for TransformerEngine alone; by then its `common` has been imported."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _ENGINE:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(fullname)
        if found is not None and found.origin is not None:
            found.loader = _Loader(fullname, found.origin)
        return found


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        common: Any = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        kernels = importlib.import_module("tests.support.engine_kernels")
        sys.modules["transformer_engine_torch"] = kernels
        # torch asks, too, whether there is a Triton, and remembers what it finds: before this.
        importlib.import_module("torch.utils._triton").has_triton_package()
        missing = [x for x in _NOT_CALLED if importlib.util.find_spec(x.partition(".")[0]) is None]
        for name in missing:
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __version__="3.6")
        super().exec_module(module)
        for name in missing:
            del sys.modules[name]
        _take_for_tensors()


def _take_for_tensors() -> None:
    """TransformerEngine tells tensors of 8 bits by their class, and would take those without memory
    for such ones."""
    import torch

    linear: Any = importlib.import_module(f"{_ENGINE}.module.linear")
    linear.needs_quantized_gemm = lambda *_, **__: False
    choice: Any = importlib.import_module(f"{_ENGINE}.attention.dot_product_attention.utils")
    choose = choice.get_attention_backend

    def get_attention_backend(parameters: Any) -> Any:
        return choose(dataclasses.replace(parameters, qkv_type=torch.Tensor))

    choice.get_attention_backend = get_attention_backend


def find_engine() -> None:
    """Has this process find TransformerEngine with the stand-in for its compiled part."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # so that it looks for no library of CUDA
    sys.meta_path.insert(0, _Finder())


if __name__ == "__main__":
    find_engine()
    server.main(sys.argv[1])
