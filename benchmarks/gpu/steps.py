"""Whole updates of our stages: the program's own model, schedule, optimizer and step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu.batches import RandomStream
from benchmarks.gpu.rows import Row, failed, not_run
from benchmarks.gpu.sizes import Sizes, run_config
from benchmarks.gpu.timing import Speed, best_batch, free_memory, speed
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.samples import StreamDataset
from megatron_kosmosg.models import same_result
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.planning.gpus import recognised_gpu
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.training.batches import BatchFeed
from megatron_kosmosg.training.setup import build_trained
from megatron_kosmosg.training.step import Reporter, train_step

INSTRUCT = "instruct, cached latents"


class OneRank:
    """A stage that trains on this process's device; a context manager."""

    def __init__(self, config: RunConfig, images_per_row: float) -> None:
        self._config, self._images_per_row = config, images_per_row

    def __enter__(self) -> OneRank:
        config = self._config
        self.context = platform.initialize(config)
        self._stage = build_stage(config, self.context, None)
        self._trained = build_trained(
            self._stage, config, self.context, takes_initial_weights=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        del self._stage, self._trained
        platform.teardown()
        free_memory()

    def speed(
        self, rows: int, seconds: float, stream: StreamDataset | None = None
    ) -> tuple[Speed, float]:
        """Of updates of one micro-batch of `rows`, and the share of the time that they wait for
        data. stream: random batches without one, which cost nothing to read."""
        training = dataclasses.replace(
            self._config.training, micro_batch_size=rows, global_batch_size=rows
        )
        config = dataclasses.replace(self._config, training=training)
        if stream is None:
            stream = RandomStream(config, rows, config.data.seq_length, self._images_per_row)
        feed = BatchFeed(stream, config, self.context, start_sample=0)
        chunks, optimizer = self._trained.chunks, self._trained.optimizer
        iterators = feed.chunk_iterators(len(chunks))
        reporter = Reporter(self.context)
        for chunk in chunks:
            chunk.train()
        waits: list[float] = []

        def update() -> None:
            parts = (self._stage, config, self.context, chunks, optimizer)
            made = train_step(*parts, feed, iterators, reporter)
            waits.append(made.totals.data_wait)

        try:
            found = speed(update, rows, self.context.device, seconds)
            timed = waits[-found.calls :]
            return found, sum(timed) / (found.calls * found.seconds)
        finally:
            feed.close()

    def dataset(self) -> StreamDataset:
        """What the stage trains on, as it opens it."""
        return self._stage.build_dataset("train")

    def flops(self, rows: int) -> float:
        """Of one such update."""
        tokens = rows * self._config.data.seq_length
        images = round(rows * self._images_per_row)
        return self._stage.flops_per_iteration(tokens, images, rows)


def step_rows(sizes: Sizes, folder: Path, device: torch.device) -> Iterator[Row]:
    """`pretrain` and `align`, and the decoder on packed text."""
    rows = (
        ("pretrain", "pretrain", None),
        ("packed", f"decoder, rows of {sizes.rows['packed'][0]:,} text tokens", 0.45),
        ("align", "align", None),
    )
    for which, name, target in rows:
        stage = "pretrain" if which == "packed" else which
        length, images = sizes.rows[which]
        config = run_config(sizes, stage, folder, positions=length)
        unit = "captions/s" if which == "align" else "tokens/s"
        try:
            yield from _measured(sizes, which, name, config, images, unit, target, device)
        except Exception as error:  # noqa: BLE001 - a row of its own; the next one goes on
            yield failed("steps", name, error)
        free_memory()


def instruct_rows(sizes: Sizes, folder: Path, device: torch.device) -> Iterator[Row]:
    """`instruct` with cached latents and with images, and what compiling and graphs give at the
    best batch of the former."""
    images = sizes.rows["instruct"][1]
    cached = ("data.latent_cache=latents",)
    best = None
    for name, overrides in ((INSTRUCT, cached), ("instruct, VAE in the step", ())):
        config = run_config(sizes, "instruct", folder, *overrides)
        target = 134 if overrides else None
        try:
            for row in _measured(
                sizes, "instruct", name, config, images, "images/s", target, device
            ):
                yield row
                best = best or int(row.details["batch"])
        except Exception as error:  # noqa: BLE001 - a row of its own; the next one goes on
            yield failed("steps", name, error)
        free_memory()
    for mode in ("regional", "cudagraph"):
        name = f"{INSTRUCT}, performance.compile={mode}"
        if not any(field.name == "performance" for field in dataclasses.fields(RunConfig)):
            yield not_run("steps", name, "this version has no performance.compile")
            continue
        if device.type == "cpu" or best is None:
            yield not_run("steps", name, "no GPU" if best else "the eager step has no figure")
            continue
        # Passes are recorded for the rows that the settings name.
        rows = [f"training.{key}_batch_size={best}" for key in ("micro", "global")]
        faster = f"performance.compile={mode}"
        config = run_config(sizes, "instruct", folder, *cached, faster, *rows)
        alone = dataclasses.replace(sizes, batches={"instruct": (best,)})
        try:
            with _refusals() as refused:
                for row in _measured(
                    alone, "instruct", name, config, images, "images/s", None, device
                ):
                    # What a trial left aside was not what was timed.
                    yield failed("steps", name, "; ".join(refused)) if refused else row
        except Exception as error:  # noqa: BLE001 - a row of its own; the next one goes on
            yield failed("steps", name, error)
        free_memory()


@contextmanager
def _refusals() -> Iterator[list[str]]:
    """Context with the lines of the faster passes that were tried inside and not taken."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    same_result.logger.addHandler(handler)
    try:
        yield lines
    finally:
        same_result.logger.removeHandler(handler)


def _measured(
    sizes: Sizes,
    which: str,
    name: str,
    config: RunConfig,
    images_per_row: float,
    unit: str,
    target: float | None,
    device: torch.device,
) -> Iterator[Row]:
    with OneRank(config, images_per_row) as rank:
        found, seen = best_batch(
            lambda rows: rank.speed(rows, sizes.seconds)[0], sizes.batches[which]
        )
        tflops = rank.flops(found.batch) / found.seconds / 1e12
    per_row = config.data.seq_length if unit == "tokens/s" else 1
    details = found.details() | {"batches": seen, "TFLOP/s": tflops}
    peak = peak_tflops(device)
    mfu = None if peak is None else tflops / peak
    if mfu is not None:
        details["MFU"] = mfu
    if which == "packed":  # its target is a share of the peak
        yield Row("steps", name, value=found.per_second * per_row, unit=unit, details=details)
        if mfu is None:
            yield not_run("steps", f"{name}, MFU", "the peak of this device is not known")
        else:
            yield Row("steps", f"{name}, MFU", value=mfu, unit="of the peak", target=target)
        return
    value = found.per_second * per_row
    yield Row("steps", name, value=value, unit=unit, target=target, details=details)


def peak_tflops(device: torch.device) -> float | None:
    """Of bf16, as the maker states it; None for a device that no table has."""
    if device.type == "cpu":
        return None
    found = torch.cuda.get_device_properties(device)
    known = recognised_gpu(found.name, found.total_memory / 2**30)
    return None if known is None else known.bf16_tflops or None
