"""Which images a prompt becomes, and everything that decides how each of them looks.

The settings of an image depend on its record and the run's defaults alone: not on the rank that
draws it, nor on what else the file holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kosmosg.data.random_keys import stream_key
from megatron_kosmosg.data.tokenizer import IMAGE as PLACEHOLDER
from megatron_kosmosg.inference.prompt_records import (
    OPTION_FIELDS,
    GenerationOptions,
    PromptError,
    PromptPart,
    PromptRecord,
    open_image_file,
)

STREAM = "generate"
SIZE_UNIT = 8
"""Pixels; diffusers takes multiples of it only."""
STRENGTH = 0.75
"""Of a start image, where none is said."""


@dataclass(frozen=True)
class RunSettings:
    """The settings that all prompts of a run share."""

    model: str
    """Fingerprint of the model's files."""
    scheduler: str
    dtype: str
    defaults: GenerationOptions
    """For records that do not say; all set but height, width (the model's own size then),
    control_image, start_image and strength."""
    loras: tuple[tuple[str, float], ...] = ()
    """Fingerprint and strength of each."""
    controlnet: tuple[str, float] | None = None
    """Fingerprint and strength."""
    rounds_down: bool = False
    """Whether the decoder's floats become bytes by leaving out what follows the point."""


@dataclass(frozen=True)
class PlannedImage:
    """One image that a run draws."""

    record: PromptRecord
    index: int
    """Its number among the images of the record, from 0."""
    options: GenerationOptions
    """Of this image: `seed` is its generator's."""
    settings: dict[str, Any]
    """All that decides how it looks, as JSON types; images as digests of their files."""

    @property
    def file_name(self) -> str:
        """The name of its file within the run's folder."""
        return f"{self.record.id}-{self.index}.png"

    @property
    def rounds_down(self) -> bool:
        """Whether the image's levels are rounded down, see RunSettings."""
        return "rounding" in self.settings

    @property
    def settings_hash(self) -> str:
        """Changes with anything that decides how the image looks."""
        return _digest(json.dumps(self.settings, sort_keys=True).encode())


class ImagePlan:
    """Plans the images of records; every image file is read and decoded once, as a check."""

    def __init__(self, run: RunSettings) -> None:
        self._run = run
        self._read: dict[Path, tuple[str, tuple[int, int]]] = {}

    def images(self, record: PromptRecord) -> list[PlannedImage]:
        """The images of the record in order. Raises PromptError naming it."""
        options = _filled(record.options, self._run.defaults)
        first, count = options.seed, options.num_images
        assert first is not None and count is not None, "see RunSettings"
        if record.options.seed is None:
            # Prompts of a file start from noise of their own, wherever they stand in it.
            first = stream_key(first, STREAM, 0, str(record.id)) % 2**32
        try:
            options = self._sized(options)
            shared = self._shared_settings(record, options)
        except PromptError as error:
            raise PromptError(f"{record.id or record.place}: {error}") from error
        assert len(record.noise) in (0, count), "a row for each picture"
        return [
            PlannedImage(
                record,
                index,
                dataclasses.replace(options, seed=first + index),
                shared | _start_settings(record, index, first + index),
            )
            for index in range(count)
        ]

    def named(self, record: PromptRecord) -> PromptRecord:
        """The record; without an id, with one made of its first words and its settings."""
        if record.id is not None:
            return record
        planned = self.images(record)[0]
        words = "-".join(re.findall(r"[a-z0-9]+", record.text.replace(PLACEHOLDER, "").lower()))
        digest = planned.settings_hash[:8]
        name = f"{words[:40].rstrip('-')}-{digest}" if words else digest
        return dataclasses.replace(record, id=name)

    def _shared_settings(self, record: PromptRecord, options: GenerationOptions) -> dict[str, Any]:
        run = self._run
        settings: dict[str, Any] = {
            "content": [self._described(part) for part in record.content],
            "model": run.model,
            "scheduler": run.scheduler,
            "dtype": run.dtype,
        }
        for name in ("negative_prompt", "steps", "guidance", "height", "width"):
            settings[name] = getattr(options, name)
        if run.rounds_down:
            settings["rounding"] = "down"
        if run.loras:
            settings["loras"] = [list(lora) for lora in run.loras]
        if run.controlnet is None and options.control_image is not None:
            raise PromptError("a control image needs --controlnet")
        if run.controlnet is not None:
            if options.control_image is None:
                raise PromptError("a ControlNet needs a control image; give control_image")
            settings["controlnet"] = list(run.controlnet)
            settings["control_image"] = self._read_image(options.control_image)[0]
        if options.start_image is None and record.options.strength is not None:
            raise PromptError("strength is of a start image; give start_image")
        if options.start_image is not None:
            strength = options.strength
            assert strength is not None and options.steps is not None, "see _filled"
            if int(options.steps * strength) < 1:
                raise PromptError(
                    f"strength {strength:g} of {options.steps} steps is none; give more steps or "
                    "more strength"
                )
            settings["start_image"] = self._read_image(options.start_image)[0]
            settings["strength"] = strength
        return settings

    def _described(self, part: PromptPart) -> dict[str, str]:
        if isinstance(part, str):
            return {"text": part}
        return {"image": self._read_image(part)[0]}

    def _read_image(self, path: Path) -> tuple[str, tuple[int, int]]:
        """(digest of the file, (width, height) of the image)."""
        if path not in self._read:
            size = open_image_file(path).size
            self._read[path] = _digest(path.read_bytes()), size
        return self._read[path]

    def _sized(self, options: GenerationOptions) -> GenerationOptions:
        """The options with the size of the control image where none is given."""
        if options.control_image is None:
            return options
        width, height = (
            max(1, side // SIZE_UNIT) * SIZE_UNIT
            for side in self._read_image(options.control_image)[1]
        )
        return dataclasses.replace(
            options, height=options.height or height, width=options.width or width
        )


def _start_settings(record: PromptRecord, index: int, seed: int) -> dict[str, Any]:
    """The settings that say what an image starts from."""
    if not record.noise:
        return {"seed": seed}
    noise = record.noise[index]
    return {"seed": 0, "noise": [noise.row, noise.num_rows]}


def _filled(options: GenerationOptions, defaults: GenerationOptions) -> GenerationOptions:
    """The strength, too, where there is a start image."""
    values = {name: getattr(options, name) for name in OPTION_FIELDS}
    filled = dataclasses.replace(
        defaults, **{name: value for name, value in values.items() if value is not None}
    )
    if filled.start_image is None or filled.strength is not None:
        return filled
    return dataclasses.replace(filled, strength=STRENGTH)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
