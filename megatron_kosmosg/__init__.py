"""KOSMOS-G on Megatron-Core and diffusers: training of its three stages, conversion, inference.

The names below are the package's API. They are imported when they are first used: importing the
package itself loads neither torch nor Megatron-Core.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megatron_kosmosg.unusable_packages import hide_unusable_in_time

if TYPE_CHECKING:
    from megatron_kosmosg.config.load import load_config
    from megatron_kosmosg.conversion.export_hf import export_hf
    from megatron_kosmosg.data.store import SampleStore
    from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline
    from megatron_kosmosg.stages import build_stage
    from megatron_kosmosg.training.loop import fit

hide_unusable_in_time()

__version__ = "0.1.0"

__all__ = [
    "KosmosGPipeline",
    "SampleStore",
    "__version__",
    "build_stage",
    "export_hf",
    "fit",
    "load_config",
]

_MODULES = {
    "KosmosGPipeline": "hf.pipeline_kosmosg",
    "SampleStore": "data.store",
    "build_stage": "stages",
    "export_hf": "conversion.export_hf",
    "fit": "training.loop",
    "load_config": "config.load",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
