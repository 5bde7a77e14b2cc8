"""Images per second of the instruct stream against a plain PIL loader, in one run.

The plain loader does what the authors' does: a tab-separated line a sample, base64 images, PIL
decoding, torchvision's resize and crop written with PIL, float64 numpy arithmetic. Both load the
same edits (one 224-pixel prompt image, one 512-pixel target) on as many threads; rounds
alternate, so that a change of the machine's speed meets all. With a GPU, DALI also decodes there.

    python benchmarks/data_loading.py --images 96 --rounds 3 --threads 1
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_kosmosg.data.images import ImageDecoder
from megatron_kosmosg.data.streams import instruct_stream
from megatron_kosmosg.inspection.inspection_page import inspection_config
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.toy import assets

BATCH = 8
CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073))
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711))


def write_images(folder: Path, count: int, width: int, height: int) -> list[bytes]:
    """JPEG photographs of noise with photograph-like detail (about 110 KB at 640 x 480)."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(count):
        layers = np.zeros((height, width, 3), np.float32)
        for cells, strength in ((6, 120), (40, 60), (160, 40), (width, 14)):
            coarse = rng.normal(0, strength, (cells * height // width + 1, cells, 3))
            grid = Image.fromarray((coarse + 128).clip(0, 255).astype(np.uint8))
            layers += np.asarray(grid.resize((width, height), Image.BICUBIC), np.float32) - 128
        out = io.BytesIO()
        Image.fromarray((layers + 128).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        images.append(out.getvalue())
        (folder / f"{i}.jpg").write_bytes(images[-1])
    return images


def write_dataset(folder: Path, count: int) -> tuple[str, str]:
    """(prefix, tokenizer model) of edits over the images in `folder`."""
    records = folder / "records.jsonl"
    with records.open("w") as file:
        for i in range(count):
            texts = {"caption": "a red circle", "instruction": "a blue square"}
            images = {"image": f"{i}.jpg", "target": f"{(i + 1) % count}.jpg"}
            file.write(json.dumps({"key": str(i)} | texts | images) + "\n")
    model = str(assets.path() / "sentencepiece.model")
    prefix = str(folder / "edits")
    preprocess(PreprocessJob("edit", (str(records),), model, prefix), lambda *_: None)
    return prefix, model


def write_tsv(path: Path, images: list[bytes]) -> list[str]:
    """The authors' layout: texts, then base64 images before and after."""
    encoded = [base64.b64encode(data).decode() for data in images]
    following = [*encoded[1:], encoded[0]]
    lines = [
        "\t".join(("a red circle", "a blue square", before, after))
        for before, after in zip(encoded, following, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return lines


def plain_image(encoded: str, size: int, resample: int, mean, std) -> torch.Tensor:
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    width, height = (int(size * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), resample)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size))) / 255.0
    return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).astype(np.float32))


def plain_loader(path: Path, threads: int, count: int) -> None:
    """Reads `count` lines in batches, samples decoded on `threads` threads."""

    def sample(line: str) -> tuple[torch.Tensor, torch.Tensor]:
        _, _, before, after = line.rstrip("\n").split("\t")
        prompt = plain_image(before, 224, Image.BICUBIC, CLIP_MEAN, CLIP_STD)
        return prompt, plain_image(after, 512, Image.BILINEAR, 0.5, 0.5)

    with path.open() as file, ThreadPoolExecutor(threads) as pool:
        lines = [next(file) for _ in range(count)]
        for start in range(0, count, BATCH):
            pairs = list(pool.map(sample, lines[start : start + BATCH]))
            torch.stack([prompt for prompt, _ in pairs])
            torch.stack([target for _, target in pairs])


def stream_loader(config, device_id: int | None, threads: int) -> Callable[[int], None]:
    """Reads edits through the stream as the loader's threads do, which live as long as the run."""
    stream = instruct_stream(config, "train", device_id)
    pool = ThreadPoolExecutor(threads)

    def batch(number: int) -> None:
        samples = [stream[number * BATCH + i] for i in range(BATCH)]
        stream.collate(samples, stream.pad_to(samples, range(BATCH)))

    def read(count: int) -> None:
        list(pool.map(batch, range(count // BATCH)))

    return read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=96, help="pictures a round, two per sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = max(BATCH, args.images // 2 // BATCH * BATCH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder, samples, args.width, args.height)
        prefix, model = write_dataset(folder, samples)
        tsv = folder / "edits.tsv"
        write_tsv(tsv, images)
        config = inspection_config(prefix, None, model, 0, folder)
        arms: dict[str, Callable[[int], None]] = {
            "plain PIL, base64 TSV": lambda count: plain_loader(tsv, args.threads, count)
        }
        device = platform.device()
        for backend in ("pillow", "dali"):
            data = dataclasses.replace(config.data, image_backend=backend)
            chosen = dataclasses.replace(config, data=data)
            try:
                ImageDecoder(backend)
            except ValueError as error:
                print(f"{backend} left out: {error}")
                continue
            arms[f"stream, {backend}"] = stream_loader(chosen, None, args.threads)
            if backend == "dali" and device.type != "cpu":
                arms["stream, dali on the GPU"] = stream_loader(chosen, device.index, args.threads)
        size = sum(map(len, images)) / len(images) / 1000
        print(
            f"{2 * samples} pictures a round ({args.width} x {args.height}, {size:.0f} KB), "
            f"{args.threads} thread(s), {args.rounds} rounds, median (lowest to highest)"
        )
        wall: dict[str, list[float]] = {name: [] for name in arms}
        cpu: dict[str, list[float]] = {name: [] for name in arms}
        for read in arms.values():
            read(BATCH * args.threads)
        for _ in range(args.rounds):
            for name, read in arms.items():
                started, spent = time.perf_counter(), time.process_time()
                read(samples)
                wall[name].append(2 * samples / (time.perf_counter() - started))
                cpu[name].append(2 * samples / (time.process_time() - spent))
        base = statistics.median(cpu["plain PIL, base64 TSV"])
        for name in arms:
            rates = (
                f"{statistics.median(r):7.1f} ({min(r):.1f} to {max(r):.1f})"
                for r in (wall[name], cpu[name])
            )
            ratio = statistics.median(cpu[name]) / base
            print(f"{name:26} {' images/s, '.join(rates)} per CPU-second, x{ratio:.2f}")


if __name__ == "__main__":
    main()
