"""Marks of tests."""

from __future__ import annotations

import pytest


def not_mended_yet(
    what_is_wrong: str, raises: type[Exception] | tuple[type[Exception], ...] = AssertionError
) -> pytest.MarkDecorator:
    """The test states what is right, and today it fails in the way that `raises` says.

    Strict: whoever mends it has to take the mark away. Preparations must not fail by an assertion
    (see commands.CommandFailed), so that nothing else passes for the known fault.
    """
    return pytest.mark.xfail(strict=True, raises=raises, reason=what_is_wrong)


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
