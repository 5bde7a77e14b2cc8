"""A rank that holds the frozen U-Net alone, from its start to its end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.paths import heartbeat_file
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.balance import row_share
from megatron_kosmosg.data.random_keys import StreamName
from megatron_kosmosg.launcher import find_rank_info
from megatron_kosmosg.models.diffusion import FrozenDiffusion, load_diffusion
from megatron_kosmosg.models.faster_passes import take_faster_passes
from megatron_kosmosg.monitoring.watchdog import Watchdog
from megatron_kosmosg.score.child_process import ScoreRankLost
from megatron_kosmosg.score.connect import ScoreRank
from megatron_kosmosg.score.generation import generate_images
from megatron_kosmosg.score.keyed_noise import KeyedNoise
from megatron_kosmosg.score.loss import DenoisingLoss
from megatron_kosmosg.score.service import serve
from megatron_kosmosg.score.stream import open_stream


def run_score_rank(config: RunConfig, rank: ScoreRank) -> bool:
    """Serves the decoder ranks until they end; True when their run is done.

    The rank holds the U-Net and the VAE, and reads nothing but target images. The decoder ranks are
    told of an error that ends it. Raises ScoreRankLost from an error of a rank of the job that does
    not end the run.
    """
    try:
        return _work(config, rank)
    except Exception as error:
        if rank.coordinates is None or rank.membership.ends_run(error):
            raise
        raise ScoreRankLost(rank.name) from error


def _work(config: RunConfig, rank: ScoreRank) -> bool:
    with rank.membership:
        diffusion = load_diffusion(config, rank.device)
        prints = _fingerprints(config, diffusion)
        take_faster_passes(diffusion, config, _rows_at_once(config, rank))
        denoising = DenoisingLoss(diffusion, config.score, config.training.seed)
        trained = StreamName("instruct", "train").noise_key

        with _heartbeat(config, rank) as at:
            at(0, "first condition")

            def denoise(
                condition: torch.Tensor,
                targets: torch.Tensor,
                positions: torch.Tensor,
                stream: str,
                keyed_noise: KeyedNoise | None,
            ) -> torch.Tensor:
                if stream == trained:
                    size = config.training.global_batch_size
                    at(int(positions.min()) // size + 1, "scoring")
                return denoising(condition, targets, positions, stream, keyed_noise)

            return serve(
                config,
                rank,
                denoise,
                partial(generate_images, config, diffusion),
                lambda split: open_stream(config, rank.device, split, "targets", False, diffusion),
                diffusion.moments,
                prints,
            )


@contextmanager
def _heartbeat(config: RunConfig, rank: ScoreRank) -> Iterator[Callable[[int, str], None]]:
    """Says (iteration, phase) to the ranks of the job; a rank outside it has nobody to tell."""
    if rank.coordinates is None:
        yield lambda iteration, phase: None
        return
    rank_info, stall_seconds = find_rank_info(), config.parallel.stall_seconds
    with Watchdog(rank_info, stall_seconds, heartbeat_file(config), may_go=True) as watchdog:
        yield watchdog.at


def _rows_at_once(config: RunConfig, rank: ScoreRank) -> int:
    """Rows in a request for a gradient: a whole micro-batch, or a part of one where these are
    few."""
    rows = config.training.micro_batch_size
    if rank.world is None or rank.coordinates is None:
        return rows
    ranks = rank.world.score_ranks_per_unit
    if num_microbatches(config, rank.world.num_replicas) >= ranks:
        return rows
    part = row_share(rows, rank.coordinates.score_index, ranks)
    return part.stop - part.start


def _fingerprints(config: RunConfig, diffusion: FrozenDiffusion) -> dict[str, str]:
    """The fingerprints of U-Net, VAE and noise schedule as loaded, and of the settings that they
    run with."""
    described = dict(diffusion.noise_scheduler.config).items()
    settings = [config.training.seed, config.data.target_image_size, config.stage]
    schedule = {name: value for name, value in described if not name.startswith("_")}
    return {
        "U-Net": _weights_digest(diffusion.unet),
        "VAE": _weights_digest(diffusion.vae),
        "noise schedule": _json_digest(schedule),
        "dtype": str(diffusion.unet.dtype),
        "settings": _json_digest(settings),
    }


def _weights_digest(module: torch.nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=12, person=b"kosmosg-score")
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}|".encode())
        values = tensor.detach().to("cpu").contiguous()
        digest.update(memoryview(values.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _json_digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
