"""Work that several threads do ahead of whoever takes its results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def results_in_order(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int, num_threads: int, name: str
) -> Iterator[Result]:
    """Yields what `work` makes of each item; up to `ahead` items are worked on beforehand.

    Raises what `work` raises, when its item's turn comes. name: of the threads.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, name) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
