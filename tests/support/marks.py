"""Marks of tests."""

from __future__ import annotations

import pytest


def skip_without_group_offload() -> None:
    """Skips where diffusers offloads groups with an accelerator only (0.38), and there is none."""
    import torch
    from diffusers.hooks import apply_group_offloading

    try:
        apply_group_offloading(
            torch.nn.Linear(1, 1), torch.device("cpu"), offload_type="leaf_level"
        )
    except AttributeError:
        pytest.skip("this diffusers needs an accelerator for group offloading")
