"""Parts of a run on their own: the frozen U-Net, image decoding, the cache of latents, the data."""

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

from benchmarks.gpu.rows import Row, failed, not_run
from benchmarks.gpu.sizes import Sizes, run_config
from benchmarks.gpu.steps import OneRank
from benchmarks.gpu.timing import Speed, best_batch, free_memory, speed
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import BlendEntry, RunConfig
from megatron_kosmosg.data.image_types import ImageTransform
from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.instruct_stream import InstructStream
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.streams import instruct_stream
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.models.diffusion import load_diffusion, load_vae, vae_fingerprint
from megatron_kosmosg.preprocess.latent_moments import LatentJob, cache_latents
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.toy import assets

_HALF = ((0.5,) * 3,) * 2
"""Mean and deviation of targets."""
DECODED_AT_ONCE, CACHE = 16, "benchmark"
DATA_PATH = "data path, cached latents"


def unet_rows(sizes: Sizes, folder: Path, device: torch.device) -> Iterator[Row]:
    """Forward pass and gradient of the condition, as the loss asks for them: eager, compiled, and
    as a CUDA graph of the eager kernels."""
    config = run_config(sizes, "instruct", folder)
    diffusion = load_diffusion(config, device)
    aligner = config.model.aligner
    shape = (aligner.num_queries, aligner.hidden_size)

    def pass_of(rows: int) -> Callable[[], torch.Tensor]:
        side = sizes.latent_side
        noisy = torch.randn(rows, 4, side, side, device=device)
        timesteps = torch.randint(0, diffusion.num_timesteps, (rows,), device=device)
        condition = torch.randn(rows, *shape, device=device, requires_grad=True)

        def run() -> torch.Tensor:
            loss = diffusion.predict(noisy, timesteps, condition).square().mean()
            return torch.autograd.grad(loss, condition)[0]

        return run

    def measured(rows: int) -> Speed:
        return speed(pass_of(rows), rows, device, sizes.seconds)

    name = "frozen U-Net, forward and condition's gradient"
    best, seen = best_batch(measured, sizes.batches["unet"])
    details = best.details() | {"batches": seen}
    yield Row("U-Net", name, value=best.per_second, unit="images/s", target=200, details=details)
    if device.type == "cpu":
        yield not_run("U-Net", f"{name}, CUDA graph", "no GPU")
    else:
        try:
            replay, wrong = _graphed(pass_of(best.batch))
            found = speed(replay, best.batch, device, sizes.seconds)
            details = found.details() | {"largest difference from eager": wrong}
            yield Row(
                *("U-Net", f"{name}, CUDA graph"),
                value=found.per_second,
                unit="images/s",
                details=details,
            )
            del replay
        except Exception as error:  # noqa: BLE001 - a row of its own; the next one goes on
            yield failed("U-Net", f"{name}, CUDA graph", error)
    free_memory()
    try:
        run = pass_of(best.batch)
        eager = run()
        diffusion.unet.compile(backend=sizes.compiler, dynamic=False)
        difference = _relative(run(), eager)
        found = speed(run, best.batch, device, sizes.seconds)
    except Exception as error:  # noqa: BLE001 - a compiler fails with whatever it likes
        yield failed("U-Net", f"{name}, torch.compile", error)
        return
    details = found.details() | {"largest difference from eager": difference}
    yield Row(
        *("U-Net", f"{name}, torch.compile"),
        value=found.per_second,
        unit="images/s",
        details=details,
    )


def _graphed(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], float]:
    """(replays the captured kernels, how far their gradient is from the eager one)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    return graph.replay, _relative(captured, eager)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


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
