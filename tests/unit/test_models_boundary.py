"""The tensor between pipeline stages."""

from __future__ import annotations

import pytest
import torch

from megatron_kosmosg.models.boundary import pack_boundary, unpack_boundary, with_zero_gradient


@pytest.mark.parametrize(("queries", "width", "hidden"), [(7, 20, 32), (4, 8, 16), (3, 5, 64)])
def test_unpack_undoes_pack_with_gradients(queries: int, width: int, hidden: int) -> None:
    states = torch.randn(9, 3, hidden, requires_grad=True)
    condition = torch.randn(3, queries, width, requires_grad=True)
    packed = pack_boundary(states, condition)
    assert packed.dim() == 3 and packed._base is None
    got_states, got_condition = unpack_boundary(packed, queries, width)
    assert torch.equal(got_states, states) and torch.equal(got_condition, condition)
    weights = torch.randn_like(condition)
    ((got_condition * weights).sum() + 2 * got_states.sum()).backward()
    assert torch.equal(condition.grad, weights) and torch.all(states.grad == 2)


def test_zero_gradient_reaches_the_source_and_the_rest_flows_on() -> None:
    source = torch.randn(3, requires_grad=True)
    value = torch.randn(2, requires_grad=True)
    (with_zero_gradient(value, source) * 3).sum().backward()
    assert torch.equal(source.grad, torch.zeros(3)) and torch.all(value.grad == 3)
