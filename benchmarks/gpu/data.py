"""The data of a run: image decoding, the cache of latents, the whole path of `instruct`."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.rows import Row, not_run
from benchmarks.gpu.sizes import Sizes, run_config
from benchmarks.gpu.steps import OneRank
from benchmarks.gpu.timing import Speed, free_memory, speed
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import BlendEntry, RunConfig
from megatron_kosmosg.data.image_types import ImageTransform
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.instruct_stream import InstructStream
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.streams import instruct_stream
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.models.diffusion import load_vae, vae_fingerprint
from megatron_kosmosg.preprocess.latent_moments import LatentJob, cache_latents
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.toy import assets

_HALF = ((0.5,) * 3,) * 2
"""Mean and deviation of targets."""
DECODED_AT_ONCE, CACHE = 16, "benchmark"
DATA_PATH = "data path, cached latents"


def data_rows(sizes: Sizes, folder: Path, device: torch.device) -> Iterator[Row]:
    """Decoding by each library, `cache_latents`, and the whole data path of `instruct`."""
    prefix, model = _edits(sizes, folder)
    threads = max(1, min(8, os.cpu_count() or 1))
    size = sizes.unet["sample_size"] * (2 ** (len(sizes.vae["block_out_channels"]) - 1))
    base = run_config(
        sizes,
        "instruct",
        folder,
        f"data.tokenizer_model={model}",
        f"model.vocab_size={Tokenizer(model).vocab_size}",
        f"data.seq_length={max(256, sizes.rows['instruct'][0])}",
        f"data.target_image_size={size}",
        f"data.num_workers={threads}",
    )
    blend = {"edits": BlendEntry(prefix)}
    config = replace(base, data=replace(base.data, blend=blend, heldout={}))
    images = [path.read_bytes() for path in sorted(folder.glob("pictures/*.jpg"))]
    mean, std = tuple(config.data.image_mean), tuple(config.data.image_std)
    transform = ImageTransform(config.model.vision.image_size, "bicubic", mean, std)
    for backend, title, place in (("pillow", "Pillow", None), ("dali", "DALI", device.index)):
        name = f"decoding, {title} on the {'CPU' if place is None else 'GPU'}"
        try:
            decoder = ImageDecoder(backend, place)
        except ConfigError as error:
            yield not_run("data", name, str(error))
            continue
        found = _decoding(decoder, images, transform, threads, device, sizes.seconds)
        details = {"threads": threads, "JPEG": "{1} x {2}".format(*sizes.images)}
        yield Row("data", name, value=found.per_second, unit="images/s", details=details)
    fingerprint = vae_fingerprint(load_vae(folder / "models", torch.float32))
    yield _caching(sizes, folder, device, prefix, size, fingerprint, threads)
    yield from _data_path(sizes, config, device, fingerprint, threads)
    yield _waiting(sizes, config)


def _decoding(
    decoder: ImageDecoder,
    images: list[bytes],
    transform: ImageTransform,
    threads: int,
    device: torch.device,
    seconds: float,
) -> Speed:
    starts = range(0, len(images), DECODED_AT_ONCE)
    batches = [images[i : i + DECODED_AT_ONCE] for i in starts]
    with ThreadPoolExecutor(threads) as pool:

        def decode() -> None:
            list(pool.map(lambda batch: decoder.decode(batch, transform), batches))

        return speed(decode, len(images), device, seconds, warm_up=1)


def _caching(
    sizes: Sizes,
    folder: Path,
    device: torch.device,
    prefix: str,
    size: int,
    fingerprint: str,
    threads: int,
) -> Row:
    """The caches are left behind: `_data_path` reads one."""
    vae = load_vae(folder / "models", torch.bfloat16).to(device)
    decoder = ImageDecoder("auto", device.index)
    store = SampleStore(prefix)
    rates = {}
    for batch in sizes.batches["vae"]:
        name = f"{CACHE}-{batch}"
        job = LatentJob(
            *(store, name, ImageTransform(size, "bilinear", *_HALF), "bf16"),
            batch_size=batch,
            num_workers=threads,
        )
        started = time.perf_counter()
        arguments = (fingerprint, decoder, 0, 1, lambda done, total: None)
        cache_latents(job, vae, *arguments)
        rates[batch] = len(store) / (time.perf_counter() - started)
    best = max(rates, key=lambda batch: rates[batch])
    details: dict[str, float | int | str] = {
        "batch": best,
        "decoder": decoder.name,
        "batches": ", ".join(f"{batch}: {rate:.4g}" for batch, rate in rates.items()),
    }
    free_memory()
    return Row(
        *("data", "cache_latents, decoding and writing included"),
        value=rates[best],
        unit="images/s",
        details=details,
    )


def _data_path(
    sizes: Sizes, config: RunConfig, device: torch.device, fingerprint: str, threads: int
) -> Iterator[Row]:
    """Prompts per second of the stream that training reads."""
    rows = sizes.batches["instruct"][-1]
    for name, cache in ((DATA_PATH, _cache_of(sizes)), ("data path, target images", None)):
        stream = _stream(config, cache, device, fingerprint)
        with ThreadPoolExecutor(threads) as pool:

            def batch(number: int, stream: InstructStream = stream) -> None:
                samples = [stream[number * rows + i] for i in range(rows)]
                stream.collate(samples, stream.pad_to(samples, range(rows)))

            def read(pool: ThreadPoolExecutor = pool, batch: Callable = batch) -> None:
                list(pool.map(batch, range(threads)))

            found = speed(read, rows * threads, device, sizes.seconds, warm_up=1)
        details = {"threads": threads}
        yield Row("data", name, value=found.per_second, unit="images/s", details=details)


def _waiting(sizes: Sizes, config: RunConfig) -> Row:
    """Of whole updates of `instruct` that read the dataset through its cache."""
    rows = sizes.batches["instruct"][1]
    cached = replace(config, data=replace(config.data, latent_cache=_cache_of(sizes)))
    with OneRank(cached, 0) as rank:
        found, share = rank.speed(rows, 3 * sizes.seconds, rank.dataset())
    return Row(
        *("data", "instruct from a dataset: share of the time waiting for data"),
        value=share,
        target=0.01,
        details=found.details() | {"images/s": found.per_second},
    )


def _stream(
    config: RunConfig, cache: str | None, device: torch.device, fingerprint: str
) -> InstructStream:
    data = replace(config.data, latent_cache=cache)
    return instruct_stream(replace(config, data=data), "train", device.index, fingerprint)


def _cache_of(sizes: Sizes) -> str:
    """One that `_caching` leaves behind."""
    return f"{CACHE}-{sizes.batches['vae'][0]}"


def _edits(sizes: Sizes, folder: Path) -> tuple[str, str]:
    """(prefix, tokenizer model) of edits between JPEG images with detail at every scale."""
    count, width, height = sizes.images
    place = folder / "pictures"
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = place / "records.jsonl"
    with records.open("w") as file:
        for i in range(count):
            layers = np.full((height, width, 3), 128.0, np.float32)
            for cells, strength in ((6, 120), (40, 60), (160, 40)):
                coarse = rng.normal(0, strength, (cells * height // width + 1, cells, 3))
                grid = Image.fromarray((coarse + 128).clip(0, 255).astype(np.uint8))
                grid = grid.resize((width, height), Image.Resampling.BILINEAR)
                layers += np.asarray(grid, np.float32) - 128
            out = io.BytesIO()
            image = Image.fromarray(layers.clip(0, 255).astype(np.uint8))
            image.save(out, "JPEG", quality=90)
            (place / f"{i:04d}.jpg").write_bytes(out.getvalue())
            texts = {"caption": "a red circle", "instruction": "make it a blue square"}
            images = {"image": f"{i:04d}.jpg", "target": f"{(i + 1) % count:04d}.jpg"}
            file.write(json.dumps({"key": str(i)} | texts | images) + "\n")
    model = str(assets.path() / "sentencepiece.model")
    prefix = str(place / "edits")
    preprocess(PreprocessJob("edit", (str(records),), model, prefix), lambda *_: None)
    return prefix, model
