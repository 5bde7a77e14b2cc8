"""Generates this rank's share of a list of prompts; images that are finished are left as they are.

Ranks share nothing but the folder. Rank r takes blocks r, r + world_size, .. of `batch_size`
records each; a block is drawn in the same calls on any number of ranks and in any continued run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from PIL import Image

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.overwrites import refuse_to_overwrite
from megatron_kosmosg.inference.contact_sheet import SheetRow, contact_sheet
from megatron_kosmosg.inference.image_files import is_finished, save_atomically, write_image
from megatron_kosmosg.inference.image_plan import ImagePlan, PlannedImage
from megatron_kosmosg.inference.prompt_records import PromptError, PromptRecord, open_image_file
from megatron_kosmosg.memory_errors import is_out_of_memory

MIN_CELL, MAX_CELL = 128, 256

ImageProgress = Callable[[int, int], None]
"""Called with (finished, all) images of this rank."""


class ImageGenerator(Protocol):
    """A model with its sampler, which draws planned images."""

    def check(self, planned_images: Sequence[PlannedImage]) -> None:
        """Raises PromptError for the first prompt that the model cannot take."""

    def generate(self, planned_images: Sequence[PlannedImage]) -> list[Image.Image]:
        """The images of one group: all of one or more records with equal `group_key`."""
        ...


@dataclass(frozen=True)
class Job:
    """Prompts, how they are drawn, and where to."""

    records: Sequence[PromptRecord]
    plan: ImagePlan
    folder: Path
    sheet_file: str
    batch_size: int = 1
    """Records per block."""
    rank: int = 0
    world_size: int = 1


def group_key(planned: PlannedImage) -> tuple[object, ...]:
    """The values that all images of one call must share."""
    options = planned.options
    size = options.height, options.width
    start = None if options.start_image is None else options.strength
    return *size, options.steps, options.guidance, options.num_images, start


def generate(job: Job, open_generator: Callable[[], ImageGenerator], report: ImageProgress) -> int:
    """Generates this rank's missing images and returns their number. The model is opened only if a
    image is missing.

    Raises PromptError before anything is written if one of this rank's prompts cannot be used, and
    ConfigError if an image would be written over one that a prompt shows, or the folder cannot be
    written to. PromptError, too, on the way where memory does not suffice.
    """
    groups = list(_groups(job))
    everything = [planned for group in groups for planned in group]
    missing = [[p for p in group if not is_finished(p, job.folder)] for group in groups]
    left = sum(map(len, missing))
    done = len(everything) - left
    if not left:
        report(done, done)
        return 0
    _refuse_to_overwrite(job, [planned for group in missing for planned in group])
    _check_writable(job.folder)
    image_generator = open_generator()
    image_generator.check(everything)
    report(done, len(everything))
    for group, unfinished in zip(groups, missing, strict=True):
        if not unfinished:
            continue
        for planned, image in zip(group, _drawn(image_generator, group), strict=True):
            if planned in unfinished:
                write_image(image, planned, job.folder)
                done += 1
        report(done, len(everything))
    return left


def write_sheet(job: Job, num_records: int) -> Path | None:
    """The contact sheet of the first records, once all their images are there (else None).

    The rank that finishes last finds them complete.
    """
    rows, sizes = [], []
    for record in job.records[:num_records]:
        planned_images = job.plan.images(record)
        if not all(is_finished(planned, job.folder) for planned in planned_images):
            return None
        results = [open_image_file(job.folder / planned.file_name) for planned in planned_images]
        shown = [(f"[{i}]", open_image_file(path)) for i, path in enumerate(record.images, start=1)]
        labels = [f"seed {planned.options.seed}" for planned in planned_images]
        rows.append(SheetRow(_numbered(record), shown, list(zip(labels, results, strict=True))))
        sizes += [max(result.size) for result in results]
    if not rows:
        return None
    path = job.folder / job.sheet_file
    save_atomically(contact_sheet(rows, min(MAX_CELL, max(MIN_CELL, *sizes))), path)
    return path


def _drawn(image_generator: ImageGenerator, group: Sequence[PlannedImage]) -> list[Image.Image]:
    """The images of a group. Raises PromptError where they do not fit into memory together."""
    try:
        return image_generator.generate(group)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        options = group[0].options
        sides = (("--height", options.height), ("--width", options.width))
        given = ", ".join(f"{name} {side}" for name, side in sides if side is not None)
        size = given or "images of the model's own size"
        said = str(error).partition("\n")[0] or type(error).__name__
        raise PromptError(
            f"{group[0].record.id}: {size} do not fit into memory, {len(group)} at once ({said}); "
            "give a smaller --height and --width, fewer --num-images or a smaller --batch-size"
        ) from error


def _check_writable(folder: Path) -> None:
    """Raises ConfigError where no file can be made in `folder`, or the folder itself: before the
    model is loaded."""
    places = (folder.absolute(), *folder.absolute().parents)
    above = next(place for place in places if os.path.exists(place))
    as_now = os.access in os.supports_effective_ids
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=as_now):
        raise ConfigError(
            f"--output {folder}: nothing can be written to {above} (permissions, or a read-only "
            "disk); give another --output"
        )


def _refuse_to_overwrite(job: Job, missing: Sequence[PlannedImage]) -> None:
    """Finished images may be shown by other prompts: they are not written again."""
    shown = [path for record in job.records for path in record.images]
    others = [path for planned in missing for path in planned.options.images]
    files = [*(planned.file_name for planned in missing), job.sheet_file]
    refuse_to_overwrite([job.folder / name for name in files], [*shown, *others], "--output")


def _groups(job: Job) -> Iterator[list[PlannedImage]]:
    starts = range(0, len(job.records), job.batch_size)
    for start in starts[job.rank :: job.world_size]:
        block = job.records[start : start + job.batch_size]
        planned_images = [planned for record in block for planned in job.plan.images(record)]
        for _, group in groupby(planned_images, group_key):
            yield list(group)


def _numbered(record: PromptRecord) -> str:
    numbers = iter(range(1, len(record.images) + 1))
    words = [part if isinstance(part, str) else f"[{next(numbers)}]" for part in record.content]
    return f"{record.id}: {' '.join(words)}"
