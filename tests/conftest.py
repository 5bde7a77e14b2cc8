"""What holds for every test: GPU tests are skipped with their reason where there is no GPU."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needed = {item: _num_gpus_needed(item) for item in items}
    if not any(needed.values()):
        return
    import torch

    found = torch.cuda.device_count()
    for item, count in needed.items():
        if count > found:
            reason = f"needs {count} CUDA device(s), this machine has {found}"
            item.add_marker(pytest.mark.skip(reason=reason))


def _num_gpus_needed(item: pytest.Item) -> int:
    several = item.get_closest_marker("multi_gpu")
    if several is not None:
        return several.args[0]
    return 1 if item.get_closest_marker("gpu") is not None else 0
