"""What holds for every test: GPU and Slurm tests are skipped, with the reason, where there is none.

KOSMOSG_REQUIRE_SLURM=1 (as .ci/run sets it) lets Slurm tests fail instead.
"""

from __future__ import annotations

import os

import pytest

from tests import local_slurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _skip_without_slurm([item for item in items if item.get_closest_marker("slurm")])
    needed = {item: _num_gpus_needed(item) for item in items}
    if not any(needed.values()):
        return
    import torch

    found = torch.cuda.device_count()
    for item, count in needed.items():
        if count > found:
            reason = f"needs {count} CUDA device(s), this machine has {found}"
            item.add_marker(pytest.mark.skip(reason=reason))


def _skip_without_slurm(items: list[pytest.Item]) -> None:
    reason = local_slurm.why_not()
    if reason is not None and os.environ.get("KOSMOSG_REQUIRE_SLURM") != "1":
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"Slurm: {reason}"))


def _num_gpus_needed(item: pytest.Item) -> int:
    several = item.get_closest_marker("multi_gpu")
    if several is not None:
        return several.args[0]
    return 1 if item.get_closest_marker("gpu") is not None else 0
