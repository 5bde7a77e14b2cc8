"""Encodes the target images of a dataset once, so that `instruct` need not (data.latent_cache).

The dataset is cut into shards of consecutive samples; rank r takes every world-size-th one. A shard
is done when its marker file exists, so that a run that was ended goes on where it stopped, with any
number of ranks. Whoever finds all shards done completes the cache: no process group is needed.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from megatron_kosmosg.data.file_lock import exclusive
from megatron_kosmosg.data.image_types import BadImage, ImageTransform
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.kinds import caption, compositional, edit
from megatron_kosmosg.data.latent_cache import (
    MOMENTS_TYPE,
    LatentSource,
    LatentWriter,
    describe_transform,
    latent_prefix,
)
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.models.diffusion import vae_moments

TARGETS = {
    "caption": caption.target_picture,
    "edit": edit.target_picture,
    "compositional": compositional.target_picture,
}
"""The picture to be drawn, by kind of sample."""


@dataclass(frozen=True)
class LatentJob:
    """One dataset to encode."""

    store: SampleStore
    name: str
    """Of the cache: PREFIX.NAME."""
    transform: ImageTransform
    precision: str
    batch_size: int = 16
    shard_size: int = 1024
    """Samples whose moments are lost at most when a rank ends."""
    num_workers: int = 2
    """Threads that decode pictures."""

    @property
    def num_shards(self) -> int:
        return -(-len(self.store) // self.shard_size)


def cache_latents(
    job: LatentJob,
    vae: AutoencoderKL,
    vae_mark: str,
    decoder: ImageDecoder,
    rank: int,
    world_size: int,
    progress: Callable[[int, int], None],
) -> bool:
    """True when the cache is complete, False while other ranks still work on it.

    vae: on the device and in the precision to encode with. vae_mark: its `vae_fingerprint`, which
    needs the weights in float32.
    progress: is told (samples of this rank done, in all). Raises ValueError for kinds without
    target images, and when an unfinished cache of that name was begun with other settings.
    """
    if job.store.kind not in TARGETS:
        raise ValueError(
            f"{job.store.prefix} is of kind {job.store.kind}; "
            f"only {', '.join(TARGETS)} have target images"
        )
    prefix = latent_prefix(job.store.prefix, job.name)
    source = LatentSource(job.store.fingerprint(), vae_mark, describe_transform(job.transform))
    parts = Path(f"{prefix}.parts")
    lock = Path(f"{prefix}.lock")
    with exclusive(lock):
        if _is_finished(prefix, source):
            return True
        _begin(parts, job, source)
    mine = range(rank, job.num_shards, world_size)
    todo = [shard for shard in mine if not _marker(parts, shard).exists()]
    done, total = 0, sum(len(_samples(job, shard)) for shard in todo)
    with ThreadPoolExecutor(job.num_workers, "decode") as pool:
        for shard in todo:
            _encode_shard(job, shard, vae, decoder, pool, prefix, parts)
            done += len(_samples(job, shard))
            progress(done, total)
    with exclusive(lock):
        if _is_finished(prefix, source):
            return True
        return _complete(job, prefix, parts, source)


def _begin(parts: Path, job: LatentJob, source: LatentSource) -> None:
    """Notes what the cache is made from, or checks what an earlier start noted."""
    noted = asdict(source) | {"precision": job.precision, "shard_size": job.shard_size}
    path = parts / "job.json"
    if path.exists():
        before = json.loads(path.read_text())
        differ = [
            f"{key}: {before[key]} -> {noted[key]}" for key in noted if before[key] != noted[key]
        ]
        if differ:
            raise ValueError(
                f"{parts} was begun with other settings: {'; '.join(differ)}; go on with those, or "
                "delete the folder to start anew"
            )
        return
    parts.mkdir(parents=True, exist_ok=True)
    _write_json(path, noted)


def _encode_shard(
    job: LatentJob,
    shard: int,
    vae: AutoencoderKL,
    decoder: ImageDecoder,
    pool: ThreadPoolExecutor,
    prefix: str,
    parts: Path,
) -> None:
    samples, bad, encoded = _samples(job, shard), [], []
    for first, pixels, errors in _decoded(job, samples, decoder, pool):
        bad += [[first + error.index, error.reason] for error in errors]
        moments = vae_moments(vae, pixels.to(vae.device))
        encoded.append(moments.cpu().numpy().astype(MOMENTS_TYPE))
    moments = np.concatenate(encoded)
    LatentWriter(prefix, moments.shape[1:], len(job.store)).write(samples.start, moments)
    _write_json(_marker(parts, shard), {"bad": bad, "shape": list(moments.shape[1:])})


def _decoded(
    job: LatentJob, samples: range, decoder: ImageDecoder, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, torch.Tensor, list[BadImage]]]:
    """(first sample, pixels, bad ones among them) of one batch after the other, read ahead."""
    target = TARGETS[job.store.kind]

    def read(first: int) -> tuple[torch.Tensor, list[BadImage]]:
        batch = range(first, min(first + job.batch_size, samples.stop))
        pictures = [bytes(target(job.store[i])) for i in batch]
        return decoder.try_decode(pictures, job.transform)

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


def _complete(job: LatentJob, prefix: str, parts: Path, source: LatentSource) -> bool:
    """Turns finished shards into the cache, if all are there."""
    markers = [_marker(parts, shard) for shard in range(job.num_shards)]
    if not all(marker.exists() for marker in markers):
        return False
    notes = [json.loads(marker.read_text()) for marker in markers]
    bad = [int(index) for note in notes for index, _ in note["bad"]]
    shape = tuple(notes[0]["shape"])
    LatentWriter(prefix, shape, len(job.store)).finish(source, bad, job.precision)
    shutil.rmtree(parts)
    return True


def _is_finished(prefix: str, source: LatentSource) -> bool:
    """Whether the cache is there already. Raises ValueError when it is another one."""
    path = Path(f"{prefix}.json")
    if not path.exists():
        return False
    found = json.loads(path.read_text())["source"]
    differ = [key for key, value in asdict(source).items() if found[key] != value]
    if differ:
        raise ValueError(
            f"{prefix} exists and was made from another {' and '.join(differ)}; delete it or give "
            "another --name"
        )
    return True


def _samples(job: LatentJob, shard: int) -> range:
    first = shard * job.shard_size
    return range(first, min(first + job.shard_size, len(job.store)))


def _marker(parts: Path, shard: int) -> Path:
    return parts / f"{shard:08d}.json"


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value) + "\n")
    temporary.rename(path)
