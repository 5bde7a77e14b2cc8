"""A module without images: nothing is computed, and whatever trains gets a gradient of zero."""

from __future__ import annotations

import torch

from megatron_kosmosg.models.no_images import no_images


def test_everything_that_trains_gets_a_zero_gradient() -> None:
    before = torch.ones(3, requires_grad=True)
    entered, frozen = before.mul(2)[:0], torch.ones(2)
    weight = torch.nn.Parameter(torch.ones(4, 5))
    out = no_images(torch.empty(0, 7), [entered, weight, frozen])
    assert out.shape == (0, 7)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4, 5)) and frozen.grad is None
    assert torch.equal(before.grad, torch.zeros(3))  # what ran before is reached, too


def test_where_nothing_trains_nothing_wants_a_gradient() -> None:
    assert not no_images(torch.empty(0, 7), [torch.ones(2)]).requires_grad
