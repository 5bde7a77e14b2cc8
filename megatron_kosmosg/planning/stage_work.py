"""FLOPs of one micro-batch on one rank of every pipeline stage, module by module.

Sizes and formulae are those of `flops.py`, the U-Net's counts those of `diffusion_flops.py`. What a
tensor-parallel rank does not share with others (image tower, text encoder, input projections) it
does whole. Recomputed forward passes count as backward work.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import WorldLayout
from megatron_kosmosg.models import flops
from megatron_kosmosg.models.diffusion_flops import diffusion_flops
from megatron_kosmosg.models.pipeline_pieces import StagePieces
from megatron_kosmosg.planning.workload import MicroBatch


@dataclass(frozen=True)
class Work:
    """FLOPs of one module on one rank for one micro-batch."""

    module: str
    kind: str
    """Which efficiency applies: decoder, aligner, vision, unet or vae."""
    forward: float
    backward: float
    batch: float
    """What the efficiency saturates with: positions per tensor rank, or images."""


def stage_work(
    config: RunConfig, pieces: StagePieces, is_last: bool, batch: MicroBatch
) -> list[Work]:
    """The modules on a rank of one pipeline stage, the frozen U-Net left out."""
    tp = config.parallel.tensor_model_parallel_size
    rows, positions = batch.rows, batch.positions
    is_first = pieces.first_decoder_layer == 0
    trains_decoder = config.stage != "align"
    again = 1 if config.training.recompute == "full" else 0
    done: list[Work] = []
    if is_first and batch.pictures:
        seen = flops.vision_flops(config, batch.pictures)
        trained = flops.trained_vision_flops(config, batch.pictures)
        done.append(Work("vision", "vision", seen, 2 * trained, batch.pictures))
        resampled = flops.resampler_flops(config, batch.pictures) / tp
        queries = batch.pictures * config.model.resampler.num_latent_queries / tp
        done.append(Work("resampler", "aligner", resampled, 2 * resampled, queries))
    if pieces.num_decoder_layers:
        share = pieces.num_decoder_layers / config.model.decoder.num_layers
        forward = flops.decoder_flops(config, positions, rows) * share / tp
        backward = forward * (2 + again) if trains_decoder else 0.0
        done.append(Work("decoder", "decoder", forward, backward, positions / tp))
    for part in pieces.aligner_parts:
        formula = flops.aligner_m_flops if part == "M" else flops.aligner_n_flops
        forward = formula(config, positions, rows) / tp
        done.append(
            Work(f"aligner_{part}", "aligner", forward, forward * (2 + again), positions / tp)
        )
    if is_last and config.stage == "pretrain":
        forward = flops.head_flops(config, positions) / tp
        done.append(Work("head", "decoder", forward, 2 * forward, positions / tp))
    if is_last and config.stage == "align":
        forward = flops.clip_text_flops(config, batch.images)
        done.append(Work("clip_text", "aligner", forward, 0.0, batch.images * 77.0))
    return done


def score_work(config: RunConfig, images: float) -> list[Work]:
    """The frozen U-Net, and the VAE's encoder unless its moments are cached, on `images` images."""
    counted = diffusion_flops(
        config.model.diffusion.path,
        config.data.target_image_size,
        config.model.aligner.num_queries,
    )
    again = counted.forward if config.score.recompute else 0
    done = [
        Work("unet", "unet", images * counted.forward, images * (counted.backward + again), images)
    ]
    if config.data.latent_cache is None:
        done.append(Work("vae", "vae", images * counted.encode, 0.0, images))
    return done


def needed_flops(
    config: RunConfig, world: WorldLayout, pieces: list[StagePieces], batches: list[MicroBatch]
) -> dict[str, float]:
    """FLOPs of one update by module, over all replicas; each rank's repeats and recomputation left
    out, padding and the null condition's row included."""
    total: dict[str, float] = {}
    once_more = config.training.recompute == "full"
    for batch in batches:
        done = [
            (work, 1 if work.module in _WHOLE else world.tp_size, once_more * _recomputed(work))
            for stage, piece in enumerate(pieces)
            for work in stage_work(config, piece, stage == world.pp_size - 1, batch)
        ]
        if config.stage == "instruct":
            again = config.score.recompute
            done += [
                (work, 1, again * work.forward * (work.module == "unet"))
                for work in score_work(config, batch.images)
            ]
        for work, ranks, redone in done:
            needed = (work.forward + work.backward - redone) * ranks * world.num_replicas
            total[work.module] = total.get(work.module, 0.0) + needed
    return total


_WHOLE = ("vision", "clip_text")
"""Modules that every tensor-parallel rank computes whole."""


def _recomputed(work: Work) -> float:
    """The forward pass that full recomputation repeats."""
    stacks = ("decoder", "aligner_M", "aligner_N")
    return work.forward if work.module in stacks and work.backward else 0.0
