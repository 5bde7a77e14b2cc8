"""Parallel linears give what torch's linear gives; a rank that holds the whole weight adds the bias
in the product."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_kosmosg.config.schema import ParallelConfig, RunConfig
from megatron_kosmosg.models.linears import ColumnParallelLinear, RowParallelLinear
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import ParallelContext
from tests.support.ranks import run_ranks

INPUTS, OUTPUTS = 12, 20
KINDS = {"column": ColumnParallelLinear, "row": RowParallelLinear}
SPLIT = {"column": {"y": -1, "weight": 0, "bias": 0}, "row": {"x": -1, "weight": 1}}
"""Axes along which a rank has a share; of the rest each has the whole."""

WAYS = list(itertools.product([False, True], repeat=2))
"""(skip_bias_add, trains)"""


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (5, 2, INPUTS), "weight": (OUTPUTS, INPUTS), "bias": (OUTPUTS,)}
    shapes["grad"] = (5, 2, OUTPUTS)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Operations(TorchDispatchMode):
    """Names of what torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def on_a_rank(kind: str, tp: int) -> dict[tuple[bool, bool], dict]:
    """What `of_linear` says: {(skip_bias_add, trains): ...}."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp, timeout_seconds=60)
    context = platform.initialize(RunConfig(stage="pretrain", parallel=parallel))
    try:
        return {way: of_linear(kind, tp, context, *way) for way in WAYS}
    finally:
        platform.teardown()


def of_linear(
    kind: str, tp: int, context: ParallelContext, skip_bias_add: bool, trains: bool
) -> dict:
    """This rank's shares of output and gradients, whether the bias was handed on, and what ran in
    the forward pass."""
    linear = KINDS[kind](
        INPUTS,
        OUTPUTS,
        config=TransformerConfig(
            num_layers=1,
            hidden_size=INPUTS,
            num_attention_heads=2,
            tensor_model_parallel_size=tp,
            params_dtype=torch.float32,
        ),
        init_method=torch.nn.init.zeros_,
        bias=True,
        skip_bias_add=skip_bias_add,
        tp_group=context.tp_group,
        **({"gather_output": False} if kind == "column" else {"input_is_parallel": True}),
    )
    given = values()
    for name, axis in SPLIT[kind].items():
        name = "grad" if name == "y" else name
        given[name] = given[name].chunk(tp, dim=axis)[context.tp_rank].contiguous()
    with torch.no_grad():
        linear.weight.copy_(given["weight"])
        linear.bias.copy_(given["bias"])
    linear.requires_grad_(trains)
    x = given["x"].requires_grad_()
    with Operations() as ran:
        y, left = linear(x)
    y = y if left is None else y + left
    y.backward(given["grad"])
    found = {"y": y, "x": x.grad, "weight": linear.weight.grad, "bias": linear.bias.grad}
    shares = {n: v.detach().numpy() for n, v in found.items() if v is not None}
    return {"shares": shares, "is_left": left is not None, "ran": ran.names}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_torchs_linear(kind, tp):
    given = values()
    leaves = {name: given[name].requires_grad_() for name in ("x", "weight", "bias")}
    y = F.linear(given["x"], given["weight"], given["bias"])
    y.backward(given["grad"])
    expected = {"y": y} | {name: leaf.grad for name, leaf in leaves.items()}
    ranks = run_ranks(tp, on_a_rank, kind, tp)
    for way in WAYS:
        skip_bias_add, trains = way
        for name in ["y", "x", *(["weight", "bias"] if trains else [])]:
            shares = [rank[way]["shares"].pop(name) for rank in ranks]
            axis = SPLIT[kind].get(name)
            found = shares[0] if axis is None else np.concatenate(shares, axis=axis)
            wanted = expected[name].detach().numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6, err_msg=f"{way} {name}")
        for rank in ranks:
            assert not rank[way]["shares"]
            assert rank[way]["is_left"] is (tp > 1 and skip_bias_add)
            assert ("addmm" in rank[way]["ran"]) is (tp == 1)
            assert ("add" in rank[way]["ran"]) is (tp > 1 and not skip_bias_add)
