"""Images are decoded in threads while a model works on the ones before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from megatron_kosmosg.data.kinds.record import Rejected

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], depth: int, num_threads: int
) -> Iterator[tuple[Item, Result | Rejected]]:
    """Yields (item, what `read` makes of it) in order; up to `depth` items are read beforehand."""

    def attempt(item: Item) -> Result | Rejected:
        try:
            return read(item)
        except Rejected as rejected:
            return rejected

    waiting: deque[tuple[Item, Future[Result | Rejected]]] = deque()
    with ThreadPoolExecutor(num_threads, "read") as pool:
        for item in items:
            waiting.append((item, pool.submit(attempt, item)))
            if len(waiting) > depth:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` neighbours; the last may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
