"""A link that is opened carries a number each way, which nobody counts as traffic."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroupGloo, Store

from megatron_kosmosg.score.link import DECODER, SCORE, Link
from megatron_kosmosg.score.messages import Kind, Request

PATIENCE = timedelta(seconds=60)


def opened(store: Store, end: int) -> Link:
    requests, answers = (
        ProcessGroupGloo(PrefixStore(name, store), end, 2, PATIENCE)
        for name in ("requests", "answers")
    )
    link = Link(requests, answers, torch.device("cpu"), most_rows=2, peer="the other end")
    link.greet(end)
    return link


def test_both_ends_greet_and_the_first_request_comes_after() -> None:
    store, received = HashStore(), []

    def serve() -> None:
        link = opened(store, SCORE)
        received.append(link.num_bytes)
        received.append(link.take_request((3, 4), torch.float32))

    served = threading.Thread(target=serve)
    served.start()
    link = opened(store, DECODER)
    assert link.num_bytes == 0
    none = torch.zeros(0, dtype=torch.int64)
    link.ask(Request(Kind.END, torch.zeros(0), torch.ones(()), none, none, is_done=True))
    link.finish()
    served.join(60)
    num_bytes, request = received
    assert num_bytes == 0 and request.kind is Kind.END and request.is_done
