"""Images are decoded in threads while a model works on the ones before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from megatron_kosmosg.data.in_threads import results_in_order
from megatron_kosmosg.data.kinds.record import Rejected

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], depth: int, num_threads: int
) -> Iterator[tuple[Item, Result | Rejected]]:
    """(item, what `read` makes of it), in order; up to `depth` items are read beforehand."""

    def attempt(item: Item) -> tuple[Item, Result | Rejected]:
        try:
            return item, read(item)
        except Rejected as rejected:
            return item, rejected

    return results_in_order(attempt, items, depth, num_threads, "read")


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` neighbours; the last may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
