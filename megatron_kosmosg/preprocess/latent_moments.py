"""Encodes the target images of a dataset once, so that `instruct` need not (data.latent_cache).

The dataset is cut into shards of consecutive samples; rank r takes every world-size-th one. A shard
is done when its mark is there, so that a run that was ended goes on where it stopped, with any
number of ranks. Whoever finds all shards done completes the cache: no process group is needed.

Long because shares, restarts, completion and the count of undecodable targets are one matter.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.overwrites import refuse_to_overwrite
from megatron_kosmosg.data.bad_images import TooManyBadImages
from megatron_kosmosg.data.dataset_files import dataset_files
from megatron_kosmosg.data.image_types import BadImage, ImageTransform
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.kinds import names_read_by
from megatron_kosmosg.data.latent_cache import (
    MOMENTS_TYPE,
    LatentManifest,
    LatentSource,
    LatentWriter,
    describe_transform,
    latent_prefix,
)
from megatron_kosmosg.data.normalise import normalise
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import RawSample
from megatron_kosmosg.files import exclusive, real_folder
from megatron_kosmosg.models.diffusion import vae_moments
from megatron_kosmosg.progress import ProgressCallback
from megatron_kosmosg.shards import ShardFolder

NUM_SHOWN, REASON_LENGTH = 3, 200
"""Bad targets that are named, and characters of what the library said."""


@dataclass(frozen=True)
class LatentJob:
    """One dataset whose targets are to be encoded, and how."""

    store: SampleStore
    name: str
    """Of the cache: PREFIX.NAME."""
    transform: ImageTransform
    precision: str
    batch_size: int = 16
    shard_size: int = 1024
    """Samples whose moments are lost at most when a rank ends."""
    num_workers: int = 2
    """Threads that decode images."""
    max_bad_images: int = 100
    """Target images that may be undecodable; one must be decodable in any case."""

    @property
    def num_shards(self) -> int:
        return -(-len(self.store) // self.shard_size)


@dataclass(frozen=True)
class BadTargets:
    """The target images that could not be decoded."""

    count: int
    first: tuple[str, ...]
    """Sample and reason of the first few."""

    def text(self, num_samples: int) -> str:
        """The bad targets in one line for people."""
        shown = "; ".join(self.first)
        more = "; ..." if 0 < len(self.first) < self.count else ""
        return (
            f"{self.count:,} of {num_samples:,} target images cannot be decoded"
            f"{': ' if shown else ''}{shown}{more}"
        )


@dataclass(frozen=True)
class CachedLatents:
    """The result of `cache_latents`."""

    is_complete: bool
    """False while other ranks still work on it."""
    bad: BadTargets
    """Of all shards that are done."""


def cache_latents(
    job: LatentJob,
    vae: AutoencoderKL,
    vae_mark: str,
    decoder: ImageDecoder,
    rank: int,
    world_size: int,
    progress: ProgressCallback,
) -> CachedLatents:
    """Encodes this rank's share of a dataset's targets; the rank that finds all shards done
    completes the cache.

    Args:
        job: the dataset, and how its targets are encoded.
        vae: on the device and in the precision to encode with.
        vae_mark: its `vae_fingerprint`, which needs the weights in float32.
        progress: of this rank's samples.

    Raises:
        ValueError: the kind has no target images, or an unfinished cache of that name was begun
            with other settings.
        TooManyBadImages: more targets than job.max_bad_images cannot be decoded, or none can.
    """
    _find_target(job.store)
    prefix = latent_prefix(job.store.prefix, job.name)
    _refuse_to_overwrite(job, prefix)
    transform = describe_transform(job.transform)
    source = LatentSource(job.store.fingerprint(), vae_mark, transform, decoder.description)
    parts = ShardFolder(Path(f"{prefix}.parts"))
    lock = Path(f"{prefix}.lock")
    with exclusive(lock):
        finished = _finished(prefix, source, job.precision)
        if finished is not None:
            return _of_finished(job, finished)
        real_folder(parts.path)
        parts.begin(asdict(source) | {"precision": job.precision, "shard_size": job.shard_size})
    todo = parts.to_do(range(rank, job.num_shards, world_size))
    bad = _bad_targets(job, _notes(job, parts))
    _check(job, bad)
    done, total = 0, sum(len(_samples(job, shard)) for shard in todo)
    progress(done, total)
    with ThreadPoolExecutor(job.num_workers, "decode") as pool:
        for shard in todo:
            bad = _encode_shard(job, shard, vae, decoder, pool, prefix, parts, bad)
            done += len(_samples(job, shard))
            progress(done, total)
    with exclusive(lock):
        finished = _finished(prefix, source, job.precision)
        if finished is not None:
            return _of_finished(job, finished)
        return _complete(job, prefix, parts, source)


def _refuse_to_overwrite(job: LatentJob, prefix: str) -> None:
    """Raises ConfigError where something else than a cache, or a part of one, has its name."""
    files = [Path(f"{prefix}{end}") for end in (".bin", ".idx")]
    found = [file for file in files if os.path.lexists(file)]
    is_dataset = Path(f"{prefix}.json").exists() or Path(f"{prefix}.parts").exists()
    if found and not is_dataset:
        raise ConfigError(
            f"{found[0]} is there and belongs to no cache of latents; give another --name"
        )
    written = [*files, Path(f"{prefix}.json"), Path(f"{prefix}.partial.bin")]
    refuse_to_overwrite(written, dataset_files(job.store.prefix), "--name")


def _check(job: LatentJob, bad: BadTargets) -> None:
    """Raises TooManyBadImages, also for a set without one image that can be decoded."""
    is_hopeless = bad.count == len(job.store)
    if bad.count > job.max_bad_images or is_hopeless:
        allowed = "one must be" if is_hopeless else f"--max-bad-images allows {job.max_bad_images}"
        raise TooManyBadImages(
            f"{job.store.prefix}: {bad.text(len(job.store))} ({allowed}); no cache was completed"
        )


def _of_finished(job: LatentJob, manifest: LatentManifest) -> CachedLatents:
    bad = BadTargets(manifest.num_bad, tuple(manifest.first_bad))
    _check(job, bad)
    return CachedLatents(True, bad)


def _bad_targets(job: LatentJob, notes: list[dict]) -> BadTargets:
    """The bad targets of the shards that `notes` tell of."""
    return _with_more(job, BadTargets(0, ()), [each for note in notes for each in note["bad"]])


def _with_more(job: LatentJob, bad: BadTargets, more: list[list]) -> BadTargets:
    """The bad targets `bad` and `more`, which are [sample number, reason] of others."""
    room = max(0, NUM_SHOWN - len(bad.first))
    shown = [
        f"sample {job.store[index].info['key']}: {reason[:REASON_LENGTH]}"
        for index, reason in more[:room]
    ]
    return replace(bad, count=bad.count + len(more), first=(*bad.first, *shown))


def _encode_shard(
    job: LatentJob,
    shard: int,
    vae: AutoencoderKL,
    decoder: ImageDecoder,
    pool: ThreadPoolExecutor,
    prefix: str,
    parts: ShardFolder,
    bad_before: BadTargets,
) -> BadTargets:
    """Encodes a shard, and returns the bad targets so far, this shard's included. Raises
    TooManyBadImages as soon as they are too many."""
    samples, bad, encoded = _samples(job, shard), [], []
    for first, pixels, errors in _decoded(job, samples, decoder, pool):
        bad += [[first + error.index, error.reason] for error in errors]
        _check(job, _with_more(job, bad_before, bad))
        moments = vae_moments(vae, normalise(pixels.to(vae.device), job.transform))
        encoded.append(moments.cpu().numpy().astype(MOMENTS_TYPE))
    moments = np.concatenate(encoded)
    LatentWriter(prefix, moments.shape[1:], len(job.store)).write(samples.start, moments)
    parts.finish(shard, {"bad": bad, "shape": list(moments.shape[1:])})
    return _with_more(job, bad_before, bad)


def _find_target(store: SampleStore) -> Callable[[RawSample], memoryview]:
    """Finds the target image of a stored sample. Raises ValueError for a kind that has none."""
    prompts = store.sample_kind.instruct
    if prompts is None:
        raise ValueError(
            f"{store.prefix} is of kind {store.kind}; "
            f"only {names_read_by('instruct')} have target images"
        )
    return prompts.target


def _decoded(
    job: LatentJob, samples: range, decoder: ImageDecoder, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, torch.Tensor, list[BadImage]]]:
    """Yields (first sample, pixels uint8, bad ones among them) for one batch after the other, read
    ahead."""
    target = _find_target(job.store)

    def read(first: int) -> tuple[torch.Tensor, list[BadImage]]:
        batch = range(first, min(first + job.batch_size, samples.stop))
        images = [bytes(target(job.store[i])) for i in batch]
        return decoder.try_levels(images, job.transform)

    ahead: deque[tuple[int, Future]] = deque()
    starts = iter(range(samples.start, samples.stop, job.batch_size))
    for first in starts:
        ahead.append((first, pool.submit(read, first)))
        if len(ahead) > job.num_workers:
            start, future = ahead.popleft()
            yield start, *future.result()
    while ahead:
        start, future = ahead.popleft()
        yield start, *future.result()


def _complete(
    job: LatentJob, prefix: str, parts: ShardFolder, source: LatentSource
) -> CachedLatents:
    """Turns finished shards into the cache, if all are there."""
    notes = _notes(job, parts)
    bad = _bad_targets(job, notes)
    _check(job, bad)
    if len(notes) < job.num_shards:
        return CachedLatents(False, bad)
    indexes = [int(index) for note in notes for index, _ in note["bad"]]
    shape = tuple(notes[0]["shape"])
    writer = LatentWriter(prefix, shape, len(job.store))
    writer.finish(source, indexes, job.precision, list(bad.first))
    parts.remove()
    return CachedLatents(True, bad)


def _notes(job: LatentJob, parts: ShardFolder) -> list[dict]:
    """The notes of the shards that are done, in their order."""
    return [parts.read(shard) for shard in range(job.num_shards) if parts.is_done(shard)]


def _finished(prefix: str, source: LatentSource, precision: str) -> LatentManifest | None:
    """The manifest of the cache that is there already. Raises ValueError when it is of another
    source or precision, or none."""
    path = Path(f"{prefix}.json")
    if not path.exists():
        return None
    manifest = LatentManifest.read(path)
    found = asdict(manifest.source)
    differ = [key for key, value in asdict(source).items() if found[key] != value]
    if differ:
        raise ValueError(
            f"{prefix} exists and was made from another {' and '.join(differ)}; delete it or give "
            "another --name"
        )
    if manifest.precision != precision:
        raise ValueError(
            f"{prefix} exists and was made with --dtype {manifest.precision}, not {precision}; "
            "give that, delete it, or give another --name"
        )
    return manifest


def _samples(job: LatentJob, shard: int) -> range:
    first = shard * job.shard_size
    return range(first, min(first + job.shard_size, len(job.store)))
