"""The values that the page's controls show when it is opened."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kosmosg.inference.noise_schedules import SAVED


@dataclass(frozen=True)
class StartValues:
    """The first values of the page's controls, and an example prompt."""

    prompt: str
    guidance: float
    steps: int
    scheduler: str
    num_images: int
    caption_prompt: str
    control_scale: float = 1.0
    is_toy: bool = False
    """Whether the page has the toy's images as examples."""


START_VALUES = StartValues("<image> in the snow", 6.0, 50, SAVED, 4, "")
"""The authors' demo."""
TOY_START_VALUES = StartValues(
    "a red circle on a yellow background", 2.0, 8, "dpm++", 4, "", is_toy=True
)
"""Without an image, so that the first press of Draw draws; the examples below have some."""
