"""The U-Net beside the decoder against the U-Net on ranks of its own, on as many ranks.

Whole training runs from random weights on random prompts and targets, in turn, so that a change of
the machine's speed meets both. Prints images/s, the idle shares and their ratio; then, for
dedicated ranks, both over the number of images per update. Without a GPU on gloo, one core a rank.

    OMP_NUM_THREADS=1 python -m benchmarks.score_placement --ranks 2 --rounds 3
    python -m benchmarks.score_placement --config examples/configs/instruct_256gpu.yaml \\
        --ranks 4 model.diffusion.path=/models/stable-diffusion-v1-5 \\
        parallel.tensor_model_parallel_size=2 score.ranks_per_replica=2
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron.core
import numpy as np
import torch

from benchmarks.trace_image import draw_trace
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.paths import output_folder, trace_file
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.instruct_stream import Reads
from megatron_kosmosg.files import write_text
from megatron_kosmosg.training.metrics import METRICS_FILE
from tests.support.ranks import run_ranks
from tests.support.trace_case import Pause, instruct_run

REPOSITORY = Path(__file__).parents[1]
WARM_UP = 2
"""Iterations that are not counted."""
NO_PAUSE = Pause()
FIRST_WORD = 4
"""Tokens below it have a meaning of their own."""


@dataclass(frozen=True)
class RandomPrompts:
    """Stands for the data: prompts of one length with one image each, and random targets."""

    config: RunConfig
    length: int
    """Positions of a prompt, its image included."""
    reads: Reads

    def __getitem__(self, position: int) -> int:
        return position

    def fingerprints(self) -> dict[str, str]:
        return {"random": "prompts"}

    def lengths(self, positions: Sequence[int]) -> np.ndarray:
        return np.full(len(positions), self.length)

    def pad_to(self, samples: Sequence[int], global_positions: Sequence[int]) -> int:
        return self.length

    def collate(self, samples: Sequence[int], pad_to: int) -> dict[str, torch.Tensor]:
        model, rows = self.config.model, len(samples)
        generator = torch.Generator().manual_seed(samples[0])
        image_mask = torch.zeros(rows, pad_to, dtype=torch.bool)
        image_mask[:, 2 : 2 + model.resampler.num_latent_queries] = True
        side = self.config.data.target_image_size
        batch = {
            "stream_positions": torch.tensor(samples),
            "replacements": torch.zeros(rows, dtype=torch.int64),
            "bad_samples": torch.tensor(0),
        }
        if self.reads != "prompts":
            batch["target_pixel_values"] = torch.rand(rows, 3, side, side, generator=generator)
            batch["target_weights"] = torch.ones(rows)
        if self.reads != "targets":
            size = (rows, pad_to)
            batch["tokens"] = torch.randint(
                FIRST_WORD, model.vocab_size - 8, size, generator=generator
            )
            batch["image_mask"] = image_mask
            batch["padding_mask"] = torch.zeros_like(image_mask)
            image = (rows, 3, model.vision.image_size, model.vision.image_size)
            batch["pixel_values"] = torch.randn(image, generator=generator)
        return batch


@dataclass(frozen=True)
class Speed:
    """Medians over the counted iterations of one run."""

    images_per_second: float
    decoder_idle: float
    score_idle: float
    link_mib: float


def run_rank(config: RunConfig, length: int, pause: Pause) -> None:
    """One rank of a run. length: of the prompts."""
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
        instruct_run(config, lambda split, reads: RandomPrompts(config, length, reads), pause)


def measure(config: RunConfig, ranks: int, length: int, pause: Pause = NO_PAUSE) -> Speed:
    """The speed of one run of `config`."""
    run_ranks(ranks, run_rank, config, length, pause, timeout=3600)
    lines = (output_folder(config) / METRICS_FILE).read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "lr" in record][WARM_UP:]

    def median(name: str) -> float:
        return statistics.median(record.get(name, 0.0) for record in records)

    return Speed(*map(median, ("samples_per_sec", "decoder_idle", "score_idle", "link_mib")))


def placed(config: RunConfig, placement: str, ranks: int, micro_batches: int) -> RunConfig:
    """The run with this placement and about `micro_batches` per replica of the dedicated layout;
    the number of images of an update depends on neither."""
    parallel, score = config.parallel, config.score
    replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    unit = score.replicas_per_rank * replica + score.ranks_per_replica
    replicas = {
        "dedicated": ranks // unit * score.replicas_per_rank,
        "colocated": ranks // replica,
    }
    least = config.training.micro_batch_size * replicas["dedicated"] * micro_batches
    both = math.lcm(config.training.micro_batch_size * replicas["dedicated"], replicas["colocated"])
    samples = -(-least // both) * both
    training = dataclasses.replace(config.training, global_batch_size=samples)
    if placement == "colocated":  # a replica has fewer images of the batch: no smaller passes
        per_replica = samples // replicas["colocated"]
        size = max(n for n in range(1, per_replica + 1)
                   if per_replica % n == 0 and n <= training.micro_batch_size)  # fmt: skip
        training = dataclasses.replace(training, micro_batch_size=size)
    return dataclasses.replace(
        config, score=dataclasses.replace(score, placement=placement), training=training
    )


def compare(config: RunConfig, ranks: int, length: int, rounds: int, micro_batches: int) -> None:
    """Prints the two placements side by side."""
    found: dict[str, list[Speed]] = {"colocated": [], "dedicated": []}
    images = 0
    for _ in range(rounds):
        for placement, speeds in found.items():
            with tempfile.TemporaryDirectory() as folder:
                run = placed(in_folder(config, folder), placement, ranks, micro_batches)
                images = run.training.global_batch_size
                speeds.append(measure(run, ranks, length))
    print(f"{ranks} ranks, {images} images an update, {rounds} rounds")
    for placement, speeds in found.items():
        line = f"{placement:9} {_median(speeds, 'images_per_second'):8.1f} images/s"
        if placement == "dedicated":
            line += (
                f", idle: decoder {_median(speeds, 'decoder_idle'):.1%}, "
                f"score {_median(speeds, 'score_idle'):.1%}, "
                f"link {_median(speeds, 'link_mib'):.3g} MiB an update"
            )
        print(line)
    ratios = [
        dedicated.images_per_second / colocated.images_per_second
        for colocated, dedicated in zip(*found.values(), strict=True)
    ]
    print(
        f"dedicated / colocated: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def sweep(config: RunConfig, ranks: int, length: int, counts: Sequence[int], pause: Pause) -> None:
    """Prints idle shares over the number of images per update."""
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            run = placed(in_folder(config, folder), "dedicated", ranks, count)
            speed = measure(run, ranks, length, pause)
        print(
            f"{run.training.global_batch_size:6} images an update: "
            f"{speed.images_per_second:8.1f} images/s, idle: decoder {speed.decoder_idle:.1%}, "
            f"score {speed.score_idle:.1%}",
            flush=True,
        )


def in_folder(config: RunConfig, folder: str) -> RunConfig:
    """The run with its files in `folder`."""
    return dataclasses.replace(config, logging=dataclasses.replace(
        config.logging, output_dir=folder
    ))  # fmt: skip


def _median(speeds: Sequence[Speed], name: str) -> float:
    return statistics.median(getattr(speed, name) for speed in speeds)


def image(config: RunConfig, ranks: int, length: int, count: int, pause: Pause, file: Path) -> None:
    """Draws the trace of the last iteration but one of a dedicated run."""
    with tempfile.TemporaryDirectory() as folder:
        run = placed(in_folder(config, folder), "dedicated", ranks, count)
        traced = run.training.train_iters - 1
        run = dataclasses.replace(
            run, logging=dataclasses.replace(run.logging, trace_iteration=traced)
        )
        run_ranks(ranks, run_rank, run, length, pause, timeout=3600)
        write_text(file, draw_trace(json.loads(trace_file(run).read_text())))
    print(f"picture of iteration {traced}: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    toy = REPOSITORY / "examples" / "configs" / "toy_instruct.yaml"
    parser.add_argument("--config", type=Path, default=toy)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="0 leaves the comparison out")
    parser.add_argument("--length", type=int, default=64, help="positions of a prompt")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a replica an update")
    parser.add_argument("--sweep", type=int, nargs="*", default=[1, 2, 4, 8, 16], metavar="N",
                        help="numbers of micro-batches an update")  # fmt: skip
    parser.add_argument("--pause", type=float, nargs=2, default=[0.0, 0.0],
                        metavar=("FORWARD", "UNET"), help="seconds slept per micro-batch by "
                        "decoder and score rank in sweep and picture, as if each had a device of "
                        "its own")  # fmt: skip
    parser.add_argument("--svg", type=Path, help="SVG file for the trace of an iteration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    fixed = [
        f"training.train_iters={arguments.iterations}",
        "optimizer.lr_warmup_iters=1",
        "training.eval_interval=0",
        "training.eval_iters=1",
        "logging.tensorboard=false",
        "logging.image_interval=0",
        "data.balance_tokens=false",
    ]
    config = load_config(arguments.config, [*fixed, *arguments.overrides])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout={}))
    ranks, length = arguments.ranks, arguments.length
    print(
        f"{time.strftime('%Y-%m-%d %H:%M')}, torch {torch.__version__}, "
        f"megatron-core {megatron.core.__version__}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} before the first run"
    )
    if arguments.rounds:
        compare(config, ranks, length, arguments.rounds, arguments.micro_batches)
    pause = Pause(*arguments.pause)
    sweep(config, ranks, length, arguments.sweep, pause)
    if arguments.svg is not None:
        image(config, ranks, length, arguments.micro_batches, pause, arguments.svg)


if __name__ == "__main__":
    main()
