"""A rank with the U-Net alone: its own start-up and service loop, conditions without numbers."""

from __future__ import annotations

from typing import Any

import torch

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.rank_grid import RankCoordinates, RankGrid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.balance import row_share
from megatron_kosmosg.models.diffusion import load_diffusion
from megatron_kosmosg.parallel.platform import join, torch_dtype
from megatron_kosmosg.rehearsal.case import RehearsalCase
from megatron_kosmosg.rehearsal.fake_links import FakeMembership
from megatron_kosmosg.rehearsal.made_up_stream import MadeUpStream
from megatron_kosmosg.rehearsal.phases import FORWARD, SERVE
from megatron_kosmosg.rehearsal.rank_update import resolved_config, take_rank
from megatron_kosmosg.rehearsal.stand_ins import StandIns
from megatron_kosmosg.score.connect import ScoreRank
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.messages import Kind, Rows, ScoreRequest
from megatron_kosmosg.score.service import serve


def run_service(case: RehearsalCase, stand_ins: StandIns) -> dict:
    """Answers one request, which brings the constants to the device, then those of one global
    batch, and leaves. Counted is from the first answer to the last.

    {"phases", "timeline", "num_micro_batches": answered, "held": bytes before the first request}.
    """
    config, recorder = resolved_config(case, stand_ins), stand_ins.recorder
    take_rank(case, stand_ins)
    with stand_ins.device():
        joined = join(config)
        diffusion = load_diffusion(config, joined.device)
        for module in (diffusion.unet, diffusion.vae):
            recorder.memory.see_all(module.parameters())
        held = recorder.memory.now
        denoising = DenoisingLoss(diffusion, config.score, config.training.seed)

        def denoise(*arguments: Any) -> torch.Tensor:
            with recorder.phase(FORWARD):
                return denoising(*arguments)

        def generate(*_: Any) -> torch.Tensor:
            raise RuntimeError("no image is asked for in a training update")

        stream: Any = MadeUpStream(config, case.length, case.images, reads="targets")
        requests = _requests(config, joined.world, joined.coordinates)
        counted: dict[str, Any] = {}

        def has_replied(num_replies: int) -> None:
            if num_replies == 1:
                recorder.forget()
            elif num_replies == len(requests):
                counted.update(phases=recorder.as_dict(), timeline=recorder.timeline())

        links: Any = FakeMembership(recorder, requests, has_replied)
        rank = ScoreRank(joined.device, "score rank", links, joined.world, joined.coordinates)
        with recorder.phase(SERVE):
            serve(config, rank, denoise, generate, lambda _: stream, diffusion.moments)
    return counted | {
        "num_micro_batches": len(requests) - 1,
        "held": {"frozen_helpers": held, "total": held},
    }


def _requests(
    config: RunConfig, world: RankGrid, coordinates: RankCoordinates
) -> list[ScoreRequest]:
    """The requests of one global batch from all replicas that the rank is for, if none is late, and
    before them one more."""
    total = num_microbatches(config, world.num_replicas)
    rows, ranks, index = (
        config.training.micro_batch_size,
        world.score_ranks_per_unit,
        coordinates.score_index,
    )
    if total >= ranks:
        sizes = [rows] * len(range(index, total, ranks))
    else:
        span = row_share(rows, index, ranks)
        sizes = [span.stop - span.start] * total
    aligner = config.model.aligner
    shape = aligner.num_queries, aligner.hidden_size
    dtype = torch_dtype(config.training.precision)
    asked = [size for size in sizes * world.replicas_per_unit if size]
    return [
        ScoreRequest(
            Kind.GRADIENT,
            Rows(tuple(range(number * size, (number + 1) * size)), (0,) * size),
            torch.zeros(size, *shape, dtype=dtype),
            torch.ones(()),
        )
        for number, size in enumerate([*asked[:1], *asked])
    ]
