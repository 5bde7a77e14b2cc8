"""Rule tables: both directions are inverses, and every name is accounted for."""

from __future__ import annotations

import pytest
import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.rules import (
    RuleTable,
    first_rows,
    interleaved,
    same,
    stacked,
    summary,
    weight_and_bias,
)
from megatron_kosmosg.conversion.tensors import (
    InMemory,
    JoinedSources,
    as_external,
    as_native,
    check_shapes,
    check_ties,
)

HEADS, WIDTH, LAYERS = 2, 6, 3
TABLE = RuleTable(
    [
        first_rows("embedding", "embed", 5, duplicates=["head"]),
        same("norm.{i}.weight", "layer.{i}.ln"),
        *weight_and_bias(
            interleaved, "layers.{i}.qkv", [f"layer.{{i}}.{p}" for p in ("q", "k", "v")], HEADS
        ),
        stacked(["tower.{i}.q", "tower.{i}.k", "tower.{i}.v"], "blocks.{i}.in_proj"),
    ],
    {"buffer.*": "a buffer without influence"},
)


@pytest.fixture
def external() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"embed": draw(7, WIDTH), "buffer.x": draw(1)}
    tensors["head"] = tensors["embed"].clone()
    for layer in range(LAYERS):
        tensors[f"layer.{layer}.ln"] = draw(WIDTH)
        tensors[f"blocks.{layer}.in_proj"] = draw(3 * WIDTH, WIDTH)
        for part in "qkv":
            tensors[f"layer.{layer}.{part}.weight"] = draw(WIDTH, WIDTH)
            tensors[f"layer.{layer}.{part}.bias"] = draw(WIDTH)
    return tensors


NATIVE = ["embedding"] + [
    name
    for layer in range(LAYERS)
    for name in (
        f"norm.{layer}.weight",
        f"layers.{layer}.qkv.weight",
        f"layers.{layer}.qkv.bias",
        *(f"tower.{layer}.{part}" for part in "qkv"),
    )
]


def test_fused_rows_are_ordered_by_head(external) -> None:
    names, make = TABLE.native_recipe("layers.1.qkv.weight")
    assert names == ["layer.1.q.weight", "layer.1.k.weight", "layer.1.v.weight"]
    fused = make([external[name] for name in names])
    rows = WIDTH // HEADS
    expected = []
    for head in range(HEADS):
        for name in names:
            expected.append(external[name][head * rows : (head + 1) * rows])
    assert torch.equal(fused, torch.cat(expected))


def test_there_and_back_changes_nothing(external) -> None:
    source = InMemory(external)
    dropped = TABLE.check(source.names(), NATIVE)
    assert dropped == {"a buffer without influence": ["buffer.x"]}
    check_ties(TABLE, source)
    native = as_native(TABLE, source, NATIVE)
    back = as_external(TABLE, native)
    assert back.names().keys() == external.keys() - {"head", "buffer.x"}
    for name, info in back.names().items():
        tensor = back.read(name)
        assert (tuple(tensor.shape), tensor.dtype) == info
        expected = external[name][:5] if name == "embed" else external[name]
        assert torch.equal(tensor, expected), name
    for name, info in native.names().items():
        assert tuple(native.read(name).shape) == info.shape


def test_every_key_is_used_once_or_named(external) -> None:
    external["layer.0.rotary"] = external.pop("layer.2.ln")
    external["layer.1.rotary"] = torch.ones(1)
    with pytest.raises(ConversionError) as caught:
        TABLE.check(external, NATIVE)
    assert "1 tensor missing:\n    layer.2.ln" in str(caught.value)
    assert "2 tensors without a place in the model:\n    layer.[0-1].rotary" in str(caught.value)


def test_layers_beyond_the_model_are_left_over(external) -> None:
    fewer = [name for name in NATIVE if ".2." not in name]
    with pytest.raises(ConversionError, match=r"layer\.2\.q\.weight"):
        TABLE.check(external, fewer)


def test_a_duplicate_may_be_absent_but_not_different(external) -> None:
    external["head"] = external["head"] + 1e-3
    with pytest.raises(ConversionError, match="head differs from embed"):
        check_ties(TABLE, InMemory(external))
    del external["head"]
    TABLE.check(external, NATIVE)
    check_ties(TABLE, InMemory(external))


def test_sizes_that_cannot_be_split_are_refused(external) -> None:
    _, make = TABLE.native_recipe("layers.0.qkv.weight")
    with pytest.raises(ConversionError, match="5 rows.*2 attention heads"):
        make([torch.ones(5, 2)] * 3)
    _, make = TABLE.native_recipe("embedding")
    with pytest.raises(ConversionError, match=r"4 rows.*vocab_size"):
        make([torch.ones(4, 2)])
    _, make = TABLE.native_recipe("tower.0.k")
    with pytest.raises(ConversionError, match="3 projections"):
        make([torch.ones(4, 2)])


def test_shapes_are_compared(external) -> None:
    infos = InMemory(external).names()
    check_shapes(infos, {"embed": (7, WIDTH)}, "x")
    with pytest.raises(ConversionError, match=r"embed has shape \[7, 6\].*\[8, 6\]; pass x"):
        check_shapes(infos, {"embed": (8, WIDTH)}, "pass x")


def test_two_rules_for_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="two rules for a"):
        RuleTable([same("a", "x"), same("a", "y")])


def test_joined_sources_answer_for_their_names(external) -> None:
    joined = JoinedSources(InMemory(external), InMemory({"more": torch.zeros(2)}))
    assert joined.names().keys() == {*external, "more"}
    assert joined.read("more").shape == (2,) and joined.read("embed").shape == (7, WIDTH)


def test_names_of_layers_are_shown_in_one_line() -> None:
    assert summary(["a.0.b", "a.1.b", "a.3.b", "c", "d.4.e"]) == ["a.[0,1,3].b", "c", "d.4.e"]
    assert summary([f"n{k}" for k in range(5)], limit=2) == ["n0", "n1", "... and 3 more"]
