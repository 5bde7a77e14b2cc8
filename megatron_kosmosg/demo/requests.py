"""What the page asks for, checked: the prompt's images, the settings, and their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_kosmosg.data.image_reading import open_image
from megatron_kosmosg.data.image_types import UnreadableImage
from megatron_kosmosg.data.tokenizer import IMAGE as PLACEHOLDER
from megatron_kosmosg.foreign_files import read_file
from megatron_kosmosg.inference.image_plan import STRENGTH
from megatron_kosmosg.inference.noise_schedules import SAVED, SCHEDULERS
from megatron_kosmosg.inference.prompt_records import (
    GenerationOptions,
    PromptError,
    PromptRecord,
    split_prompt,
)

MAX_UPLOAD_BYTES = 32 << 20
"""Of one file."""
MAX_PIXELS = 50_000_000
"""Of one image; decoded, it takes three or four bytes a pixel."""
MAX_IMAGES = 64
"""Of one prompt, whatever the model's sequence holds."""
MAX_NUM_IMAGES, MAX_STEPS, MAX_SIDE, MAX_GUIDANCE = 8, 250, 2048, 30.0
MIN_STRENGTH, MAX_SCALE = 0.05, 2.0
MAX_PAGE_SEED = 2**53 - 1
"""What a browser holds exactly."""
MAX_RANDOM_SEED = 2**31 - 1
"""Of those that the page chooses: the authors' range."""
MAX_WORDS = 20_000
"""Characters of a prompt."""
NONE = "none"
"""The choice of no ControlNet."""
SCHEDULER_NAMES = (SAVED, *SCHEDULERS)


@dataclass(frozen=True)
class GenerationRequest:
    """What the page asks for with one press of its button."""

    prompt: str
    images: tuple[Path, ...]
    options: GenerationOptions
    scheduler: str
    controlnet: str = NONE
    """Name of one of the command line."""
    control_scale: float = 1.0
    lora_scale: float = 1.0
    """Multiplies the strengths of all LoRAs of the command line."""

    def record(self) -> PromptRecord:
        """Raises PromptError where the prompt and its images do not fit."""
        if len(self.prompt) > MAX_WORDS:
            raise PromptError(f"the prompt has more than {MAX_WORDS:,} characters")
        check_images(self.images)
        content = split_prompt(self.prompt, self.images, "prompt")
        if not content:
            raise PromptError("write a prompt, or add an image and write <image>")
        return PromptRecord("image", content, self.options)


def generation_request(
    prompt: str, images: Sequence[str | Path], values: Mapping[str, Any]
) -> GenerationRequest:
    """The request of the page's values. Raises PromptError naming the field.

    Args:
        values: negative_prompt, guidance, steps, scheduler, seed, num_images, and perhaps height
            and width (pixels; 0 or None: the model's own), start_image and strength, controlnet,
            control_image and control_scale, and lora_scale.
    """
    scheduler = values["scheduler"]
    if scheduler not in SCHEDULER_NAMES:
        raise PromptError(f"scheduler is one of {', '.join(SCHEDULER_NAMES)}")
    guidance = _number(values, "guidance", 0, MAX_GUIDANCE)
    negative = values["negative_prompt"] or ""
    if len(negative) > MAX_WORDS:
        raise PromptError(f"the negative prompt has more than {MAX_WORDS:,} characters")
    files = {name: values.get(name) for name in ("start_image", "control_image")}
    paths = {name: Path(file) for name, file in files.items() if file is not None}
    check_images(list(paths.values()))
    controlnet = values.get("controlnet") or NONE
    if controlnet == NONE and "control_image" in paths:
        raise PromptError("choose a ControlNet for the control image, or take the image out")
    strength = _number({"strength": STRENGTH, **values}, "strength", MIN_STRENGTH, 1)
    return GenerationRequest(
        prompt=prompt,
        images=tuple(map(Path, images)),
        options=GenerationOptions(
            negative_prompt=negative,
            seed=_integer(values, "seed", 0, MAX_PAGE_SEED),
            num_images=_integer(values, "num_images", 1, MAX_NUM_IMAGES),
            steps=_integer(values, "steps", 1, MAX_STEPS),
            guidance=guidance,
            height=_integer(values, "height", 0, MAX_SIDE) or None,
            width=_integer(values, "width", 0, MAX_SIDE) or None,
            strength=strength if "start_image" in paths else None,
            **paths,
        ),
        scheduler=scheduler,
        controlnet=controlnet,
        control_scale=_number({"control_scale": 1.0, **values}, "control_scale", 0, MAX_SCALE),
        lora_scale=_number({"lora_scale": 1.0, **values}, "lora_scale", 0, MAX_SCALE),
    )


def check_images(images: Sequence[Path]) -> None:
    """Raises PromptError for too many images, and for one that is too large or none."""
    if len(images) > MAX_IMAGES:
        raise PromptError(f"{len(images)} images; a prompt takes at most {MAX_IMAGES}")
    for path in images:
        try:
            data = read_file(path, MAX_UPLOAD_BYTES)
            width, height = _size(data)
        except (OSError, UnreadableImage) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise PromptError(f"{path.name} cannot be used as an image: it {reason}") from error
        if width * height > MAX_PIXELS:
            raise PromptError(
                f"{path.name} has {width} x {height} pixels; at most {MAX_PIXELS / 1e6:g} million"
            )


def _size(data: bytes) -> tuple[int, int]:
    """The (width, height) of an image, from its header alone: what would decode to too much is not
    decoded."""
    image: Image.Image = open_image(data)
    return image.size


def count_line(prompt: str, num_images: int) -> tuple[bool, str]:
    """(whether they fit, what the page says about the numbers of placeholders and images)."""
    count = prompt.count(PLACEHOLDER)
    text = f"{count} {PLACEHOLDER} in the text, {num_images} image{'s' * (num_images != 1)} added"
    if count < num_images:
        return False, f"{text}: write {PLACEHOLDER} where each image goes"
    if count > num_images:
        return False, f"{text}: add {count - num_images} more, or take {PLACEHOLDER} out"
    return True, text


def page_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The page's values of the settings that a drawn PNG says (`read_settings`).

    Raises PromptError for settings that the page cannot show.
    """
    values = {
        "prompt": settings["prompt"],
        "negative_prompt": settings.get("negative_prompt") or "",
        "guidance": settings.get("guidance"),
        "steps": settings.get("steps"),
        "scheduler": settings.get("scheduler"),
        "seed": settings.get("seed"),
        "num_images": 1,
        "height": settings.get("height") or 0,
        "width": settings.get("width") or 0,
        "strength": settings.get("strength", STRENGTH),
    }
    generation_request(values["prompt"], [], values)
    return values


def recorded_additions(
    settings: Mapping[str, Any],
) -> tuple[tuple[str, float] | None, list[tuple[str, float]]]:
    """(fingerprint and strength of the ControlNet, those of each LoRA) with which a PNG was drawn,
    from what it says of itself.

    Raises PromptError for settings that `kosmosg` has not written.
    """

    def pair(value: Any) -> tuple[str, float]:
        match value:
            case [str(digest), int() | float() as strength]:
                return digest, float(strength)
        raise PromptError("its settings are damaged: a ControlNet or LoRA has no strength")

    control, loras = settings.get("controlnet"), settings.get("loras") or []
    if not isinstance(loras, list):
        raise PromptError("its settings are damaged: loras is no list")
    return None if control is None else pair(control), [pair(lora) for lora in loras]


def image_names(settings: Mapping[str, Any]) -> list[str]:
    """The names of the images in the prompt of a drawn PNG, as far as it says them."""
    shown, content = settings.get("shown"), settings.get("content")
    if not (isinstance(shown, list) and isinstance(content, list)):
        return []
    return [
        str(name)
        for name, part in zip(shown, content, strict=False)
        if isinstance(part, dict) and "image" in part
    ]


def _number(values: Mapping[str, Any], name: str, smallest: float, largest: float) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PromptError(f"{name} is a number")
    if not smallest <= value <= largest:
        raise PromptError(f"{name} is a number from {smallest:g} to {largest:g}")
    return float(value)


def _integer(values: Mapping[str, Any], name: str, smallest: int, largest: int) -> int:
    value = values.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise PromptError(f"{name} is a whole number")
    if not smallest <= value <= largest:
        raise PromptError(f"{name} is a whole number from {smallest} to {largest:,}")
    return int(value)
