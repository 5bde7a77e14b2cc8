"""How weights of two formats correspond: one table per pair of formats, read in both directions.

"Ours" are the names of a one-process model's `state_dict()`, without vocabulary padding; "theirs"
those of the other format. `{i}` in a name stands for the layer number.
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
    """Tensors of ours that hold the same numbers as tensors of theirs.

    Names are patterns. `to_ours` and `to_theirs` take all tensors of one side in the order of the
    names and return all of the other; they only move rows, so gradients and meta tensors pass.
    `duplicates` are names under which the other format may hold theirs[0] once more (tied weights).
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors]
    to_theirs: Callable[[Tensors], Tensors]
    duplicates: tuple[str, ...] = ()


def same(ours: str, theirs: str) -> Rule:
    """The rule for a tensor that has another name in the other format and is otherwise the same."""
    return Rule((ours,), (theirs,), list, list)


def first_rows(ours: str, theirs: str, rows: int, duplicates: Sequence[str] = ()) -> Rule:
    """Ours is the first `rows` rows of theirs (a vocabulary that was extended or padded)."""

    def to_ours(tensors: Tensors) -> Tensors:
        if len(tensors[0]) < rows:
            raise ConversionError(
                f"{theirs} has {len(tensors[0])} rows, at least {rows} are needed; "
                "check model.vocab_size"
            )
        return [tensors[0][:rows]]

    return Rule((ours,), (theirs,), to_ours, list, tuple(duplicates))


def interleaved(ours: str, theirs: Sequence[str], heads: int) -> Rule:
    """Megatron's fused projection <-> separate ones: ours has, per head, that head's rows of each
    of theirs in turn ([q_0; k_0; v_0; q_1; ...]). heads: attention heads of this stack."""

    def to_ours(tensors: Tensors) -> Tensors:
        _check_heads(tensors[0], theirs[0], heads)
        parts = [tensor.unflatten(0, (heads, -1)) for tensor in tensors]
        return [torch.stack(parts, dim=1).flatten(0, 2)]

    def to_theirs(tensors: Tensors) -> Tensors:
        parts = tensors[0].unflatten(0, (heads, len(theirs), -1))
        return [part.flatten(0, 1) for part in parts.unbind(1)]

    return Rule((ours,), tuple(theirs), to_ours, to_theirs)


def stacked(ours: Sequence[str], theirs: str) -> Rule:
    """Separate projections of ours <-> one tensor of theirs with their rows one after another."""

    def to_ours(tensors: Tensors) -> Tensors:
        if len(tensors[0]) % len(ours):
            raise ConversionError(
                f"{theirs} has {len(tensors[0])} rows, which do not divide into {len(ours)} "
                "projections"
            )
        return list(tensors[0].chunk(len(ours)))

    return Rule(tuple(ours), (theirs,), to_ours, lambda tensors: [torch.cat(tensors)])


def weight_and_bias(
    make: Callable[..., Rule], ours: str | Sequence[str], theirs: str | Sequence[str], *args
) -> list[Rule]:
    """The same rule for `.weight` and `.bias` of modules: `make(ours, theirs, *args)` twice."""

    def suffixed(names: str | Sequence[str], suffix: str) -> str | list[str]:
        return names + suffix if isinstance(names, str) else [name + suffix for name in names]

    return [make(suffixed(ours, end), suffixed(theirs, end), *args) for end in (".weight", ".bias")]


@dataclass(frozen=True)
class RuleTable:
    """All rules between our format and one other.

    may_drop: {pattern with `*`: reason}, names of theirs that ours has no use for.
    """

    rules: Sequence[Rule]
    may_drop: Mapping[str, str] = field(default_factory=dict)
    _by_ours: dict[str, tuple[Rule, int]] = field(init=False, repr=False)
    _by_theirs: dict[str, tuple[Rule, int]] = field(init=False, repr=False)
    _by_duplicate: dict[str, Rule] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_ours", _index(self.rules, lambda rule: rule.ours))
        object.__setattr__(self, "_by_theirs", _index(self.rules, lambda rule: rule.theirs))
        found = {name: rule for rule in self.rules for name in rule.duplicates}
        object.__setattr__(self, "_by_duplicate", found)

    def ours_from(self, ours: str) -> tuple[list[str], Callable[[Tensors], torch.Tensor]]:
        """(their names, function of those tensors) by which our tensor `ours` is made."""
        return _find(self._by_ours, ours, "ours")

    def theirs_from(self, theirs: str) -> tuple[list[str], Callable[[Tensors], torch.Tensor]]:
        """(our names, function of those tensors) by which their tensor `theirs` is made."""
        return _find(self._by_theirs, theirs, "theirs")

    def has_rule_for(self, theirs: str) -> bool:
        """Whether the tensor `theirs` turns into tensors of ours (duplicates do not)."""
        return split_layer(theirs)[0] in self._by_theirs

    def their_names(self, ours: Collection[str]) -> list[str]:
        """Names of theirs that our tensors `ours` turn into, without duplicates of tied ones."""
        return list(dict.fromkeys(name for our in ours for name in self.ours_from(our)[0]))

    def ties(self, theirs: Collection[str]) -> list[tuple[str, str]]:
        """The pairs (name, duplicate) among `theirs` that must hold equal tensors."""
        found = []
        for name in theirs:
            pattern, layer = split_layer(name)
            if pattern in self._by_duplicate:
                found.append((_fill(self._by_duplicate[pattern].theirs[0], layer), name))
        return found

    def check(self, theirs: Collection[str], ours: Collection[str]) -> dict[str, list[str]]:
        """Checks that `theirs` give all of `ours` and that nothing is left over. Returns the names
        that are dropped, as {reason: names}.

        Raises ConversionError that lists the missing names and those without a use.
        """
        wanted = set(self.their_names(ours))
        present = set(theirs)
        duplicates = {name for tied, name in self.ties(present) if tied in wanted}
        dropped: dict[str, list[str]] = {}
        leftover = []
        for name in sorted(present - wanted - duplicates):
            reason = self._reason_to_drop(name)
            if reason is None:
                leftover.append(name)
            else:
                dropped.setdefault(reason, []).append(name)
        problems = {
            "missing": sorted(wanted - present),
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
    others, convert = (rule.theirs, rule.to_ours) if side == "ours" else (rule.ours, rule.to_theirs)
    return [_fill(other, layer) for other in others], lambda tensors: convert(tensors)[position]


def _fill(pattern: str, layer: str | None) -> str:
    return pattern if layer is None else pattern.replace("{i}", layer)


def _check_heads(tensor: torch.Tensor, name: str, heads: int) -> None:
    if len(tensor) % heads:
        raise ConversionError(
            f"{name} has {len(tensor)} rows, which do not divide into {heads} attention heads; "
            "check num_attention_heads of that stack"
        )
