"""The opened model behind the page: draws, captions, and stops when it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_kosmosg.data.tokenizer import IMAGE as PLACEHOLDER
from megatron_kosmosg.demo.controlnets import NamedControlNet
from megatron_kosmosg.demo.requests import NONE, GenerationRequest, check_images, recorded_additions
from megatron_kosmosg.files import fingerprint
from megatron_kosmosg.inference.captioning import continue_prompt
from megatron_kosmosg.inference.image_files import write_image
from megatron_kosmosg.inference.image_plan import ImagePlan, PlannedImage, RunSettings
from megatron_kosmosg.inference.model_source import ModelSource
from megatron_kosmosg.inference.pipeline_generator import PipelineGenerator
from megatron_kosmosg.inference.prompt_records import (
    GenerationOptions,
    PromptError,
    open_image_file,
    split_prompt,
)

DEFAULTS = GenerationOptions(
    negative_prompt="", seed=0, num_images=1, steps=50, guidance=6.0, height=None, width=None
)
ProgressCallback = Callable[[float, str], object]
"""Called with the share that is done, 0 to 1, and words for people; nothing is done with what it
returns."""


class Cancelled(Exception):
    """The user has asked to stop; the message says how far it came."""


class Studio:
    """One opened model, which does one thing at a time, for all sessions."""

    def __init__(
        self,
        image_generator: PipelineGenerator,
        source: ModelSource,
        dtype: str,
        controlnets: Mapping[str, NamedControlNet] | None = None,
    ) -> None:
        """Takes the opened model.

        Args:
            image_generator: generates; it shows no progress of its own from now on.
            source: the files that the model was made of; the images say them.
            dtype: name of the type of its weights; the images say it, too.
            controlnets: by the names that the page offers.
        """
        self.image_generator = image_generator
        image_generator.show_steps(False)
        self._dtype = dtype
        self._busy = threading.Lock()
        self.model_fingerprint = source.model_fingerprint()
        self._loras = tuple((fingerprint(file), strength) for file, strength in source.loras)
        # Most folders have the same name for it.
        self.lora_names = [
            file.parent.name if file.stem == "pytorch_lora_weights" else file.stem
            for file, _ in source.loras
        ]
        self._controlnets = dict(controlnets or {})

    @property
    def longest_prompt(self) -> int:
        """Positions of the model's sequence; an image takes `image_positions` of them."""
        pipeline = self.image_generator.pipeline
        limits = [
            pipeline.mllm.config.text_config.max_position_embeddings,
            pipeline.aligner.longest_prompt,
        ]
        return min(limit for limit in limits if limit is not None)

    @property
    def image_positions(self) -> int:
        """Positions that an image takes, its two marks included."""
        return self.image_generator.pipeline.mllm.config.latent_query_num + 2

    @property
    def max_images(self) -> int:
        """The most images that a prompt has room for, when it has no words but its <s>."""
        return (self.longest_prompt - 1) // self.image_positions

    @property
    def controlnet_names(self) -> list[str]:
        """The names of ControlNets that a request may ask for, besides none."""
        return list(self._controlnets)

    def plan(self, request: GenerationRequest, defaults: GenerationOptions = DEFAULTS) -> ImagePlan:
        """The images that the request asks for, with the settings of each. Raises PromptError."""
        chosen = self._chosen(request)
        return ImagePlan(
            RunSettings(
                self.model_fingerprint,
                request.scheduler,
                self._dtype,
                defaults,
                tuple((digest, request.lora_scale * scale) for digest, scale in self._loras),
                None if chosen is None else (chosen.digest, request.control_scale),
            )
        )

    def prepare(self, request: GenerationRequest) -> None:
        """Sets the image generator up as the request says; to be called while nobody else uses
        it."""
        chosen = self._chosen(request)
        self.image_generator.choose_scheduler(request.scheduler)
        self.image_generator.choose_lora_scale(request.lora_scale)
        model = None if chosen is None else chosen.model
        self.image_generator.choose_controlnet(model, request.control_scale)

    def _chosen(self, request: GenerationRequest) -> NamedControlNet | None:
        if request.controlnet == NONE:
            return None
        if request.controlnet not in self._controlnets:
            offered = ", ".join([NONE, *self._controlnets])
            raise PromptError(f"there is no ControlNet {request.controlnet!r} here but {offered}")
        return self._controlnets[request.controlnet]

    def additions(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The controlnet, control_scale and lora_scale that a drawn PNG says it was drawn with, as
        far as these additions were given to this page."""
        control, loras = recorded_additions(settings)
        values: dict[str, Any] = {"controlnet": NONE, "control_scale": 1.0, "lora_scale": 1.0}
        for name, known in self._controlnets.items():
            if control is not None and known.digest == control[0]:
                values |= {"controlnet": name, "control_scale": control[1]}
        if loras and [digest for digest, _ in loras] == [digest for digest, _ in self._loras]:
            scale = self._loras[0][1]
            values["lora_scale"] = loras[0][1] / scale if scale else 1.0
        return values

    def missing_additions(self, settings: Mapping[str, Any]) -> list[str]:
        """Kinds of additions that the PNG was drawn with and that this page does not have."""
        control, loras = recorded_additions(settings)
        known = [each.digest for each in self._controlnets.values()]
        has_control = control is None or control[0] in known
        digests = [digest for digest, _ in self._loras]
        has_loras = not loras or [digest for digest, _ in loras] == digests
        return ["ControlNet"] * (not has_control) + ["LoRA"] * (not has_loras)

    def generate(
        self,
        request: GenerationRequest,
        folder: Path,
        progress: ProgressCallback,
        stop: threading.Event,
    ) -> list[Path]:
        """PNG files of the request in `folder`, each of which says its settings.

        Raises PromptError for what cannot be drawn, Cancelled soon after `stop` is set.
        """
        planned_images = self.plan(request).images(request.record())
        with self._busy:
            self.prepare(request)
            self.image_generator.check(planned_images)
            steps = steps_of(planned_images[0].options)
            on_step = step_reporter(steps, progress, stop)
            images = self.image_generator.generate(planned_images, on_step)
        return [
            write_image(image, planned, folder)
            for image, planned in zip(images, planned_images, strict=True)
        ]

    def caption(self, prompt: str, images: Sequence[Path], max_new_tokens: int) -> str:
        """The words that the language model says after the prompt. Raises PromptError."""
        check_images(images)
        text = prompt if PLACEHOLDER in prompt or not images else PLACEHOLDER * len(images) + prompt
        content = split_prompt(text, list(images), "prompt")
        if not content:
            raise PromptError("add an image, or write some words")
        parts: list[str | Image.Image] = [
            part if isinstance(part, str) else open_image_file(part) for part in content
        ]
        with self._busy:
            try:
                return continue_prompt(self.image_generator.pipeline, parts, max_new_tokens)
            except ValueError as error:
                raise PromptError(str(error)) from error

    def while_nobody_draws(self) -> threading.Lock:
        """Held while a batch uses the image generator itself."""
        return self._busy


def steps_of(options: GenerationOptions) -> int:
    """The number of denoising steps that are made: a share of those asked for where there is a
    start image."""
    assert options.steps is not None, "see RunSettings"
    if options.start_image is None or options.strength is None:
        return options.steps
    return int(options.steps * options.strength)


class SteppingGenerator:
    """A `ImageGenerator` (inference/generate.py) whose images can be watched and stopped."""

    def __init__(self, image_generator: PipelineGenerator, on_step: Callable[[int], None]) -> None:
        self._image_generator, self._on_step = image_generator, on_step

    def check(self, planned_images: Sequence[PlannedImage]) -> None:
        self._image_generator.check(planned_images)

    def generate(self, planned_images: Sequence[PlannedImage]) -> list[Image.Image]:
        return self._image_generator.generate(planned_images, self._on_step)


def step_reporter(
    steps: int, progress: ProgressCallback, stop: threading.Event
) -> Callable[[int], None]:
    """Says each step with the time left, and raises Cancelled when `stop` is set."""
    started = time.monotonic()

    def on_step(done: int) -> None:
        if stop.is_set():
            raise Cancelled(f"stopped after step {done} of {steps}")
        left = (time.monotonic() - started) / done * max(0, steps - done)  # pndm takes one more
        progress(min(done / steps, 1.0), f"step {done} of {steps}, {left:.0f} s left")

    return on_step
