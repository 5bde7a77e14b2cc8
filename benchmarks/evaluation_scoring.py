"""Speed of scoring images beside the bare forward passes of the same networks, in one run.

    python benchmarks/evaluation_scoring.py                     # on this machine's CPU or GPU
    python benchmarks/evaluation_scoring.py --network inception --threads 16

Images of --side pixels are written as PNG files. Each round takes them both ways, in turn, so that
a change of the machine's speed meets both:

  scoring  what the commands do: files read, decoded and resized in threads, batches of 32 through
           the network, features written
  forward  batches of 32 that are in memory already, through the network alone

Printed are medians over the rounds in images a second, and their ratio. Weights are random, which
costs the same. DINO and Inception have the published sizes; --clip FOLDER adds CLIP.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_kosmosg.evaluation.feature_files import SHARD_ITEMS, FeatureFiles, ImageGroup
from megatron_kosmosg.evaluation.networks import (
    IMAGE_RULES,
    ImageNetwork,
    Weights,
    find_clip,
    find_dino,
    find_inception,
    open_network,
)
from megatron_kosmosg.evaluation.preprocessing import FID_PROTOCOLS, PixelRule, read_rgb
from megatron_kosmosg.launcher import ALONE
from megatron_kosmosg.toy.stand_in_networks import write_dino
from tests.support.scoring_networks import write_inception

RULES: dict[str, PixelRule] = IMAGE_RULES | {"inception": FID_PROTOCOLS["kosmosg-rerun"].generated}


def write_images(folder: Path, count: int, side: int) -> tuple[Path, ...]:
    """Smooth colours with a little noise, which PNG packs about as well as photos."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = rng.integers(-6, 7, smooth.shape, dtype=np.int16)
        paths.append(folder / f"{i:05d}.png")
        Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).save(paths[-1])
    return tuple(paths)


def seconds_of_scoring(
    paths: tuple[Path, ...], weights: Weights, device: torch.device, threads: int
) -> float:
    """Of the features of all images, the opened network included as the first batch is read."""
    group = ImageGroup("generated", paths, {weights.network: RULES[weights.network]})
    with tempfile.TemporaryDirectory() as name:
        files = FeatureFiles(Path(name), [group], {weights.network: weights})
        times: list[float] = []
        files.extract(ALONE, device, threads, lambda done, total: times.append(time.perf_counter()))
    # From the end of the first batch: reports are made at the start and after each.
    return (times[-1] - times[1]) / (len(times) - 2)


def seconds_of_forward(network: ImageNetwork, pixels: torch.Tensor, batches: int) -> float:
    """Of one batch, features on the CPU as scoring has them."""
    network.features(pixels)
    started = time.perf_counter()
    for _ in range(batches):
        network.features(pixels)
    return (time.perf_counter() - started) / batches


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=sorted(RULES), action="append", help="(dino)")
    parser.add_argument("--clip", type=Path, help="openai/clip-vit-base-patch32, for clip")
    parser.add_argument("--batches", type=int, default=5, help=f"of {SHARD_ITEMS} images (5)")
    parser.add_argument("--side", type=int, default=512, help="pixels of an image (512)")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways, in turn (3)")
    parser.add_argument("--threads", type=int, default=4, help="that read images (4)")
    parser.add_argument("--device", help="as torch names it (a GPU if there is one)")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(prefix="evaluation_scoring_") as name:
        folder = Path(name)
        paths = write_images(folder, (args.batches + 1) * SHARD_ITEMS, args.side)
        known = {
            "dino": lambda: find_dino(write_dino(folder / "dino.pth")),
            "inception": lambda: find_inception(write_inception(folder / "inception.pth")),
            "clip": lambda: find_clip(args.clip),
        }
        print(
            f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} of torch, "
            f"{args.threads} that read; {args.batches} batches of {SHARD_ITEMS} images of "
            f"{args.side} pixels, {args.rounds} rounds"
        )
        for chosen in args.network or ["dino"]:
            if chosen == "clip" and args.clip is None:
                parser.error("--network clip needs --clip FOLDER")
            weights = known[chosen]()
            network = open_network(weights, device)
            rule = RULES[chosen]
            pixels = torch.stack([rule(read_rgb(path)) for path in paths[:SHARD_ITEMS]])
            scoring, forward = [], []
            for _ in range(args.rounds):
                forward.append(seconds_of_forward(network, pixels, args.batches))
                scoring.append(seconds_of_scoring(paths, weights, device, args.threads))
            rates = [SHARD_ITEMS / statistics.median(times) for times in (scoring, forward)]
            print(
                f"{chosen:10} scoring {rates[0]:8.1f} images/s, forward {rates[1]:8.1f}, "
                f"forward / scoring {rates[1] / rates[0]:.2f}"
            )


if __name__ == "__main__":
    main()
