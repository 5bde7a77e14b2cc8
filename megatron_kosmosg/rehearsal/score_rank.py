"""A rank with the U-Net alone: its own start-up and service loop, conditions without numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.balance import share
from megatron_kosmosg.models.diffusion import load_diffusion
from megatron_kosmosg.parallel.platform import torch_dtype
from megatron_kosmosg.rehearsal.case import Case
from megatron_kosmosg.rehearsal.made_up_stream import MadeUpStream
from megatron_kosmosg.rehearsal.phases import FORWARD, SERVE
from megatron_kosmosg.rehearsal.rank_update import resolved_config, take_place
from megatron_kosmosg.rehearsal.stand_ins import StandIns
from megatron_kosmosg.score.connect import ScoreRank, join_as_score_rank, most_rows
from megatron_kosmosg.score.link import Link
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.messages import Kind, Request
from megatron_kosmosg.score.service import serve


def run_service(case: Case, stand_ins: StandIns) -> dict:
    """Answers the requests of one global batch and leaves.

    {"phases", "timeline", "num_micro_batches": answered, "held": bytes before the first request}.
    """
    config, recorder = resolved_config(case, stand_ins), stand_ins.recorder
    take_place(case, stand_ins)
    with stand_ins.device():
        rank = join_as_score_rank(config)
        diffusion = load_diffusion(config, rank.device)
        for module in (diffusion.unet, diffusion.vae):
            recorder.memory.see_all(module.parameters())
        held = recorder.memory.now
        denoising = DenoisingLoss(diffusion, config.score, config.training.seed)

        def denoise(*arguments: Any) -> torch.Tensor:
            with recorder.phase(FORWARD):
                return denoising(*arguments)

        def draw(*_: Any) -> torch.Tensor:
            raise RuntimeError("no image is asked for in a training update")

        stream: Any = MadeUpStream(config, case.length, case.images, reads="targets")
        with _disable_current_modes():  # these have numbers
            requests = _requests(config, rank)
            stand_ins.collectives.letters.extend(_headers(config, requests))
        recorder.forget()
        with recorder.phase(SERVE):
            dtype = torch_dtype(config.training.precision)
            serve(config, rank, denoise, draw, lambda _: stream, dtype)
    return {
        "phases": recorder.as_dict(),
        "timeline": recorder.timeline(),
        "num_micro_batches": len(requests) - len(rank.links),
        "held": {"frozen_helpers": held, "total": held},
    }


def _requests(config: RunConfig, rank: ScoreRank) -> list[Request]:
    """Those of one global batch from all replicas in turn, and each replica's last."""
    total = num_microbatches(config, rank.world.num_replicas)
    rows, ranks, index = (
        config.training.micro_batch_size,
        rank.world.score_ranks_per_unit,
        rank.place.score_index,
    )
    if total >= ranks:
        sizes = [rows] * len(range(index, total, ranks))
    else:
        span = share(rows, index, ranks)
        sizes = [span.stop - span.start] * total
    turns = [_request(Kind.GRADIENT, size) for size in sizes for _ in rank.links]
    return turns + [_request(Kind.END, 0)] * len(rank.links)


def _request(kind: Kind, rows: int) -> Request:
    positions = list(range(rows))
    zeros = torch.zeros(rows, dtype=torch.int64)
    numbers = torch.tensor(positions, dtype=torch.int64)
    return Request(kind, torch.zeros(rows, 1), torch.ones(()), numbers, zeros, is_done=rows == 0)


def _headers(config: RunConfig, requests: list[Request]) -> list[list[float]]:
    """The numbers that a decoder rank's own end of the link would send."""
    sent: list[torch.Tensor] = []
    box: Any = _Outbox(sent)
    link = Link(box, box, torch.device("cpu"), most_rows(config), "nobody")
    for request in requests:
        link.ask(request)
    return [tensor.tolist() for tensor in sent if tensor.dtype is torch.float64]


class _Outbox:
    """In place of a process group: keeps what is sent."""

    def __init__(self, sent: list[torch.Tensor]) -> None:
        self._sent = sent

    def send(self, tensors: list[torch.Tensor], *_: Any) -> _Outbox:
        self._sent.extend(tensors)
        return self

    def wait(self) -> None: ...
