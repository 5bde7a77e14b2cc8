"""Rehearses every kind of rank of a run, one after another, and gathers what they did.

Imports no torch: the ranks run in the process of `FakeDevice`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_kosmosg.progress import ProgressCallback
from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.fake_device import FakeDevice, FakeDeviceError

_DESCRIBE = "megatron_kosmosg.rehearsal.rehearsed_ranks:describe"
_SERVE = "megatron_kosmosg.rehearsal.rehearsed_score_rank:run_service"
SCORE = "score"


def rehearse(
    device: FakeDevice,
    config: str | None,
    overrides: Sequence[str],
    num_gpus: int,
    gpu: str,
    on_progress: ProgressCallback,
) -> dict[str, Any]:
    """Rehearses one update of every kind of rank of a run.

    Args:
        device: where the ranks are rehearsed.
        config: config file or shipped name, already checked; so are overrides.
        num_gpus: ranks of the run.
        gpu: their kind, by its name in a plan.
        on_progress: is told how many kinds are done.

    Returns:
        dict: what `rehearsed_ranks.describe` says of the run, "gpu" and "num_gpus". Each of its
        "kinds" has besides, under "rehearsed", what `run_update` or `run_service` returns or the
        "error" that ended it. Behind a pipeline stage with an error it is not rehearsed, and has
        "skipped".

    Raises:
        FakeDeviceError: the device ends, or cannot describe the run.
    """
    plain = RehearsalCase(config, tuple(overrides), 0, 0, world_size=num_gpus, gpu=gpu)
    described = device.run(dataclasses.replace(plain, do=_DESCRIBE))
    if "error" in described:
        error = described["error"]
        raise FakeDeviceError(f"{error['message']} (at {error['place']})")
    kinds = described["kinds"]
    batch = f"training.global_batch_size={described['global_batch_size']}"
    case = dataclasses.replace(
        plain,
        overrides=(*overrides, batch),
        length=described["length"],
        images=described["images"],
        num_updates=2,  # what a run does once, such as uploading constants, does not count
    )
    on_progress(0, len(kinds))
    before: dict[str, Any] | None = None
    for number, kind in enumerate(kinds, start=1):
        rank_case = dataclasses.replace(case, rank=kind["rank"])
        if kind["name"] == SCORE:
            kind["rehearsed"] = device.run(dataclasses.replace(rank_case, do=_SERVE))
        elif before is not None and "sent" not in before:
            kind["rehearsed"] = {"skipped": "the pipeline stage before it did not end"}
        else:
            rank_case = rank_case if before is None else behind(rank_case, before)
            kind["rehearsed"] = before = device.run(rank_case)
        on_progress(number, len(kinds))
    described.pop("cpu_seconds")
    described.pop("resident_bytes")
    return {"gpu": gpu, "num_gpus": num_gpus} | described


def behind(case: RehearsalCase, before: dict[str, Any]) -> RehearsalCase:
    """The case of the rank on the pipeline stage behind the one that did `before`."""
    sent = list(before["sent"].values())  # the first went to the pipeline stage behind, others back
    return dataclasses.replace(
        case,
        received=tuple(sent[0]) if sent else None,
        store_values=tuple(before["told"].items()),
        upstream_trains=before["trains"],
    )
