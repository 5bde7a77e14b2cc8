"""One update of `instruct` with the U-Net on ranks of its own or not, for comparison."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusion import load_diffusion
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.score.connect import join_as_score_rank, open_remote_score
from megatron_kosmosg.score.generation import generate_images
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.remote import ScoreWork
from megatron_kosmosg.score.service import serve
from megatron_kosmosg.score.wire import RunEnd
from megatron_kosmosg.stages.held_out_images import held_out_images
from megatron_kosmosg.stages.instruct import InstructStage
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.step import Reporter, forward_losses
from tests.support.shares import Share, gradients
from tests.support.stage_gradients import train_pass
from tests.support.tiny_stream import TinyStream


@dataclass(frozen=True)
class Placed:
    """What one rank knows after an update, an evaluation and a grid of images."""

    is_score_rank: bool
    loss: float = 0.0
    """Sum over this replica's images; 0 but on the last pipeline stage."""
    share: Share | None = None
    heldout_loss: float = 0.0
    grid: np.ndarray | None = None
    modules: tuple[str, ...] = ()
    """Large modules alive on this rank."""
    unet_changed: bool = False
    work: ScoreWork | None = None


def placed_update(config: RunConfig) -> Placed:
    """This rank's part of one update, one evaluation and one grid of images."""
    try:
        if platform.holds_unet_alone(config):
            return _serve(config)
        return _train(config)
    finally:
        platform.teardown()


def update_with_trouble(config: RunConfig) -> None:
    """The score rank raises in its first answer while the decoder rank waits for it."""
    if not platform.holds_unet_alone(config):
        placed_update(config)
        return
    rank = join_as_score_rank(config)

    def fail(*arguments: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("this score rank's own trouble")

    with rank.membership:
        serve(config, rank, fail, fail, lambda split: TinyStream("instruct", reads="targets"))


def _serve(config: RunConfig) -> Placed:
    rank = join_as_score_rank(config)
    diffusion = load_diffusion(config, rank.device)
    before = _fingerprint(diffusion.unet)
    with rank.membership:
        serve(
            config,
            rank,
            DenoisingLoss(diffusion, config.score, config.training.seed),
            partial(generate_images, config, diffusion),
            lambda split: TinyStream("instruct", reads="targets"),
            diffusion.moments,
        )
    return Placed(
        True, modules=_large_modules(), unet_changed=before != _fingerprint(diffusion.unet)
    )


def _train(config: RunConfig) -> Placed:
    context = platform.initialize(config)
    stage = InstructStage(config, context, open_remote_score(config, context))
    reads = "prompts" if context.num_score_ranks else "all"
    packs = config.data.pack_prompts
    stream = TinyStream("instruct", reads=reads, packs=packs)
    feed = BatchFeed(stream, config, context, start_sample=0)
    reports, chunks, model = train_pass(stage, config, context, iter(feed))
    share = gradients(model, context)
    work = stage.remote_score.pop_work() if stage.remote_score is not None else None
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        heldout = forward_losses(
            stage,
            config,
            context,
            chunks,
            feed,
            [iter(feed)],
            Reporter(context, stage.remote_score),
        )
        imaged = TinyStream("instruct", packs=packs)
        drawn = held_out_images(config, context, stage._generate, imaged, chunks)
    feed.close()
    if stage.remote_score is not None:
        stage.remote_score.close(RunEnd.DONE)
    return Placed(
        False,
        sum(float(report["loss"][0]) for report in reports),
        share,
        heldout.losses["loss"],
        np.asarray(drawn.images["held_out_prompts"]) if drawn.images else None,
        _large_modules(),
        work=work,
    )


def _large_modules() -> tuple[str, ...]:
    import gc

    names = {type(o).__name__ for o in gc.get_objects() if isinstance(o, torch.nn.Module)}
    expected = {"UNet2DConditionModel", "AutoencoderKL", "KosmosG"}
    return tuple(sorted(names & expected))


def _fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.blake2b()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
