"""How weights of two formats correspond: one table per pair of formats, read in both directions.

"Native" are the names of a one-process model's `state_dict()`, without vocabulary padding;
"external" those of the other format. `{i}` in a name stands for the layer number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from megatron_kosmosg.config.errors import ConversionError

Tensors = list[torch.Tensor]
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Rule:
    """Native tensors that hold the same numbers as external ones.

    Names are patterns. `to_native` and `to_external` take all tensors of one side in the order of
    the names and return all of the other; they only move rows, so gradients and meta tensors pass.
    `duplicates` are names under which the other format may hold `external[0]` once more (tied
    weights).
    """

    native: tuple[str, ...]
    external: tuple[str, ...]
    to_native: Callable[[Tensors], Tensors]
    to_external: Callable[[Tensors], Tensors]
    duplicates: tuple[str, ...] = ()


def same(native: str, external: str) -> Rule:
    """The rule for a tensor that has another name in the other format and is otherwise the same."""
    return Rule((native,), (external,), list, list)


def first_rows(native: str, external: str, rows: int, duplicates: Sequence[str] = ()) -> Rule:
    """The native tensor is the first `rows` rows of the external one (a vocabulary that was
    extended or padded)."""

    def to_native(tensors: Tensors) -> Tensors:
        if len(tensors[0]) < rows:
            raise ConversionError(
                f"{external} has {len(tensors[0])} rows, at least {rows} are needed; "
                "check model.vocab_size"
            )
        return [tensors[0][:rows]]

    return Rule((native,), (external,), to_native, list, tuple(duplicates))


def interleaved(native: str, external: Sequence[str], heads: int) -> Rule:
    """Megatron's fused projection <-> separate ones: the native tensor has, per head, that head's
    rows of each external one in turn ([q_0; k_0; v_0; q_1; ...]). heads: attention heads of this
    stack."""

    def to_native(tensors: Tensors) -> Tensors:
        _check_heads(tensors[0], external[0], heads)
        parts = [tensor.unflatten(0, (heads, -1)) for tensor in tensors]
        return [torch.stack(parts, dim=1).flatten(0, 2)]

    def to_external(tensors: Tensors) -> Tensors:
        parts = tensors[0].unflatten(0, (heads, len(external), -1))
        return [part.flatten(0, 1) for part in parts.unbind(1)]

    return Rule((native,), tuple(external), to_native, to_external)


def stacked(native: Sequence[str], external: str) -> Rule:
    """Separate native projections <-> one external tensor with their rows one after another."""

    def to_native(tensors: Tensors) -> Tensors:
        if len(tensors[0]) % len(native):
            raise ConversionError(
                f"{external} has {len(tensors[0])} rows, which do not divide into {len(native)} "
                "projections"
            )
        return list(tensors[0].chunk(len(native)))

    return Rule(tuple(native), (external,), to_native, lambda tensors: [torch.cat(tensors)])


def weight_and_bias(
    make: Callable[..., Rule], native: str | Sequence[str], external: str | Sequence[str], *args
) -> list[Rule]:
    """The same rule for `.weight` and `.bias` of modules: `make(native, external, *args)` twice."""

    def suffixed(names: str | Sequence[str], suffix: str) -> str | list[str]:
        return names + suffix if isinstance(names, str) else [name + suffix for name in names]

    return [
        make(suffixed(native, end), suffixed(external, end), *args) for end in (".weight", ".bias")
    ]


@dataclass(frozen=True)
class RuleTable:
    """All rules between the native format and one external one.

    may_drop: {pattern with `*`: reason}, external names that the model has no use for.
    """

    rules: Sequence[Rule]
    may_drop: Mapping[str, str] = field(default_factory=dict)
    _by_native: dict[str, tuple[Rule, int]] = field(init=False, repr=False)
    _by_external: dict[str, tuple[Rule, int]] = field(init=False, repr=False)
    _by_duplicate: dict[str, Rule] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_native", _index(self.rules, lambda rule: rule.native))
        object.__setattr__(self, "_by_external", _index(self.rules, lambda rule: rule.external))
        found = {name: rule for rule in self.rules for name in rule.duplicates}
        object.__setattr__(self, "_by_duplicate", found)

    def native_recipe(self, native: str) -> tuple[list[str], Callable[[Tensors], torch.Tensor]]:
        """(external names, function of those tensors) by which the native tensor is made."""
        return _find(self._by_native, native, "native")

    def external_recipe(self, external: str) -> tuple[list[str], Callable[[Tensors], torch.Tensor]]:
        """(native names, function of those tensors) by which the external tensor is made."""
        return _find(self._by_external, external, "external")

    def has_rule_for(self, external: str) -> bool:
        """Whether the tensor `external` turns into native ones (duplicates do not)."""
        return split_layer(external)[0] in self._by_external

    def external_names(self, native: Collection[str]) -> list[str]:
        """The external names that the `native` tensors turn into, without duplicates of tied
        ones."""
        return list(
            dict.fromkeys(name for tensor in native for name in self.native_recipe(tensor)[0])
        )

    def ties(self, external: Collection[str]) -> list[tuple[str, str]]:
        """The pairs (name, duplicate) among `external` that must hold equal tensors."""
        found = []
        for name in external:
            pattern, layer = split_layer(name)
            if pattern in self._by_duplicate:
                found.append((_fill(self._by_duplicate[pattern].external[0], layer), name))
        return found

    def check(self, external: Collection[str], native: Collection[str]) -> dict[str, list[str]]:
        """Checks that `external` give all of `native` and that nothing is left over. Returns the
        names that are dropped, as {reason: names}.

        Raises ConversionError that lists the missing names and those without a use.
        """
        expected = set(self.external_names(native))
        present = set(external)
        duplicates = {name for tied, name in self.ties(present) if tied in expected}
        dropped: dict[str, list[str]] = {}
        leftover = []
        for name in sorted(present - expected - duplicates):
            reason = self._reason_to_drop(name)
            if reason is None:
                leftover.append(name)
            else:
                dropped.setdefault(reason, []).append(name)
        problems = {
            "missing": sorted(expected - present),
            "without a place in the model": leftover,
        }
        lines = [
            f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {what}:\n    "
            + "\n    ".join(summary(names))
            for what, names in problems.items()
            if names
        ]
        if lines:
            raise ConversionError("the tensors do not fit the model\n  " + "\n  ".join(lines))
        return dropped

    def _reason_to_drop(self, name: str) -> str | None:
        for pattern, reason in self.may_drop.items():
            if fnmatchcase(name, pattern):
                return reason
        return None


def split_layer(name: str) -> tuple[str, str | None]:
    """Splits the number between dots off a name: "a.3.b" gives ("a.{i}.b", "3"), a name without one
    (name, None)."""
    found = _LAYER.search(name)
    return (name, None) if found is None else (_LAYER.sub("{i}", name, count=1), found.group())


def summary(names: Collection[str], limit: int = 30) -> list[str]:
    """The names with equal ones of several layers in one line, at most `limit` lines."""
    layers: dict[str, list[int]] = {}
    for name in names:
        pattern, layer = split_layer(name)
        layers.setdefault(pattern, []).extend([] if layer is None else [int(layer)])
    lines = [
        pattern.replace("{i}", _ranges(numbers)) if numbers else pattern
        for pattern, numbers in layers.items()
    ]
    return lines if len(lines) <= limit else [*lines[:limit], f"... and {len(lines) - limit} more"]


def _ranges(numbers: list[int]) -> str:
    first, last, count = min(numbers), max(numbers), len(set(numbers))
    if count == 1:
        return str(first)
    if count == last - first + 1:
        return f"[{first}-{last}]"
    return "[" + ",".join(str(number) for number in sorted(set(numbers))) + "]"


def _index(
    rules: Sequence[Rule], names_of: Callable[[Rule], tuple[str, ...]]
) -> dict[str, tuple[Rule, int]]:
    index: dict[str, tuple[Rule, int]] = {}
    for rule in rules:
        for position, name in enumerate(names_of(rule)):
            assert name not in index, f"two rules for {name}"
            index[name] = (rule, position)
    return index


def _find(
    index: Mapping[str, tuple[Rule, int]], name: str, side: str
) -> tuple[list[str], Callable[[Tensors], torch.Tensor]]:
    pattern, layer = split_layer(name)
    if pattern not in index:
        raise ConversionError(f"no rule says what {name} is in the other format")
    rule, position = index[pattern]
    others, convert = (
        (rule.external, rule.to_native) if side == "native" else (rule.native, rule.to_external)
    )
    return [_fill(other, layer) for other in others], lambda tensors: convert(tensors)[position]


def _fill(pattern: str, layer: str | None) -> str:
    return pattern if layer is None else pattern.replace("{i}", layer)


def _check_heads(tensor: torch.Tensor, name: str, heads: int) -> None:
    if len(tensor) % heads:
        raise ConversionError(
            f"{name} has {len(tensor)} rows, which do not divide into {heads} attention heads; "
            "check num_attention_heads of that stack"
        )
