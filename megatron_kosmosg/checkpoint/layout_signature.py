"""How a run was laid out over ranks, as far as its random state depends on it.

Dropout draws from a generator of each rank, for the layers that the rank holds. The generators'
states are therefore taken back only where every rank holds the same part of the model as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_kosmosg.config.schema import ParallelConfig
from megatron_kosmosg.parallel.context import ParallelContext

UNKNOWN_SPLIT = (
    "the checkpoint does not say how the decoder's layers were split over pipeline stages: dropout "
    "masks differ from an unbroken run if the split was another"
)
OTHER_LAYOUT = "another parallel layout: dropout masks differ from an unbroken run"


def layout_signature(context: ParallelContext, parallel: ParallelConfig) -> dict[str, Any]:
    """What a checkpoint keeps: sizes by name, and what each pipeline stage holds (None: one)."""
    split = parallel.pipeline_layout if context.pp_size > 1 else None
    return {
        "tp": context.tp_size,
        "pp": context.pp_size,
        "dp": context.dp_size,
        "vp": parallel.virtual_pipeline_model_parallel_size or 1,
        "pipeline_layout": None if split is None else "".join(split.split()),
    }


def compare_layouts(saved: Mapping[str, Any], current: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether the checkpoint's random state fits this run's ranks, and notes for the log.

    A field that the checkpoint lacks is unknown, not different. Checkpoints of earlier versions
    have no `pipeline_layout`, and `vp` where a rank held several pipeline stages alone.
    """
    saved = {"vp": 1, **saved}
    if any(name in saved and saved[name] != value for name, value in current.items()):
        return False, [OTHER_LAYOUT]
    unknown = current["pp"] > 1 and "pipeline_layout" not in saved
    return True, [UNKNOWN_SPLIT] if unknown else []
