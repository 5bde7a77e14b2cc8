"""Changing lengths make torch.compile work a few times and not until it gives up."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_the_fused_bias_dropout_add_stays_far_from_the_limit_of_graphs(rehearse, mode):
    case = rehearse.tiny("instruct", do="tests.support.compiled_calls:count_graphs")
    answer = rehearse.answer(case)
    assert answer[mode] <= answer["limit"] / 2
