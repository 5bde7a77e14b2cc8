"""A JSONL of prompts and the images that it names -> a zip of images, as `kosmosg generate`."""

from __future__ import annotations

import shutil
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

from megatron_kosmosg.demo.requests import (
    MAX_NUM_IMAGES,
    MAX_PAGE_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MAX_UPLOAD_BYTES,
    GenerationRequest,
    check_images,
)
from megatron_kosmosg.demo.studio import (
    Cancelled,
    ProgressCallback,
    SteppingGenerator,
    Studio,
    step_reporter,
    steps_of,
)
from megatron_kosmosg.files import replacing
from megatron_kosmosg.inference.generate import Job, generate, write_sheet
from megatron_kosmosg.inference.prompt_records import PromptError, PromptRecord, read_records

MAX_RECORDS = 200
SHEET_ROWS = 40
_LIMITS = {
    "num_images": MAX_NUM_IMAGES,
    "steps": MAX_STEPS,
    "height": MAX_SIDE,
    "width": MAX_SIDE,
    "seed": MAX_PAGE_SEED,
}


def generate_batch(
    studio: Studio,
    jsonl: Path,
    images: Sequence[Path],
    defaults: GenerationRequest,
    folder: Path,
    progress: ProgressCallback,
    stop: threading.Event,
) -> Path:
    """Generates a list of prompts. Returns `folder`/images.zip, which has every image, and a sheet
    of the first prompts.

    Args:
        folder: new and empty.
        images: files that the records name, each by its own name.
        defaults: for what a record does not say.

    Raises PromptError before anything is drawn, Cancelled soon after `stop` is set.
    """
    records = gathered(jsonl, images, folder / "prompts")
    plan = studio.plan(defaults, defaults.options)
    job = Job(records, plan, folder / "images", "contact_sheet.png")
    total = sum(len(plan.images(record)) for record in records)
    finished = 0

    def report(done: int, everything: int) -> None:
        nonlocal finished
        finished = done
        progress(done / everything, f"{done} of {everything} images")
        if stop.is_set():
            raise Cancelled(f"stopped after {done} of {everything} images")

    def of_all(share: float, words: str) -> None:
        progress((finished + share) / total, f"{finished} of {total} images, {words}")

    def step(done: int) -> None:
        step_reporter(max(steps_of(defaults.options), done), of_all, stop)(done)

    with studio.while_nobody_draws():
        studio.prepare(defaults)
        generate(job, lambda: SteppingGenerator(studio.image_generator, step), report)
    write_sheet(job, SHEET_ROWS)
    return zipped(job.folder, folder / "images.zip")


def gathered(jsonl: Path, images: Sequence[Path], folder: Path) -> list[PromptRecord]:
    """The records, their images beside a copy of the file in `folder`. Raises PromptError."""
    check_images(images)
    if jsonl.stat().st_size > MAX_UPLOAD_BYTES:
        raise PromptError(f"{jsonl.name} has more than {MAX_UPLOAD_BYTES >> 20} MiB")
    folder.mkdir(parents=True)
    for path in images:
        if (folder / path.name).exists():
            raise PromptError(f"two images are called {path.name}")
        shutil.copyfile(path, folder / path.name)
    copied = folder / "prompts.jsonl"
    if copied.exists():
        raise PromptError("an image is called prompts.jsonl")
    shutil.copyfile(jsonl, copied)
    records = read_records(copied)
    if len(records) > MAX_RECORDS:
        raise PromptError(f"{len(records)} records; at most {MAX_RECORDS} at a time")
    for record in records:
        for name, largest in _LIMITS.items():
            value = getattr(record.options, name)
            if value is not None and value > largest:
                raise PromptError(f"{record.id}: {name} is at most {largest:,} here")
    return records


def zipped(folder: Path, path: Path) -> Path:
    """The PNG files of `folder`, which are packed already."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for file in sorted(folder.glob("*.png")):
            archive.write(file, file.name)
    return path
