"""Generates planned images with a KosmosGPipeline, through a ControlNet if there is one, and from
noise or from a start image under noise.

The start noise of every image comes from a generator on the CPU with the image's own seed, so
that it is the same on every device and in every batch. Long because each way of drawing hands
diffusers arguments of its own, and they are put together here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image, ImageOps

from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline, Parts
from megatron_kosmosg.inference.image_plan import SIZE_UNIT, PlannedImage
from megatron_kosmosg.inference.noise_schedules import noise_scheduler
from megatron_kosmosg.inference.prompt_records import (
    GenerationOptions,
    PromptError,
    PromptRecord,
    open_image_file,
)

OnStep = Callable[[int], None]
"""Called with the number of sampling steps that are done; what it raises ends the drawing."""
SIDES = ("height", "width")
Value = TypeVar("Value")


class PipelineGenerator:
    """The `ImageGenerator` of generate.py that draws with a KosmosGPipeline."""

    def __init__(
        self,
        pipeline: KosmosGPipeline,
        controlnet: ControlNetModel | None = None,
        control_scale: float = 1.0,
        loras: Mapping[str, float] | None = None,
    ) -> None:
        """Takes the pipeline as it is, on the device that it is on.

        Args:
            pipeline: reads the prompts and, without a ControlNet, draws.
            controlnet: guides the drawing by each image's control image.
            control_scale: strength of the ControlNet.
            loras: strength of each adapter of `pipeline`, by its name.
        """
        self._pipeline = pipeline
        self._scheduler = self._saved_scheduler = pipeline.scheduler
        self._loras, self._lora_scale = dict(loras or {}), 1.0
        self._shows_steps = True
        self.choose_controlnet(controlnet, control_scale)

    def show_steps(self, shown: bool) -> None:
        """Whether every call shows a bar of its sampling steps."""
        self._shows_steps = shown

    def choose_controlnet(self, controlnet: ControlNetModel | None, scale: float = 1.0) -> None:
        """Generates through this one from now on, or through none. It moves to the U-Net's device,
        the one before it to the CPU: there is one at a time on a GPU."""
        before = getattr(self, "_controlnet", None)
        if before is not None and before is not controlnet:
            before.to("cpu")
        if controlnet is not None:
            # Module: diffusers wraps its own `to` so that a type checker sees no method.
            cast(torch.nn.Module, controlnet).to(self._pipeline._execution_device)
        self._controlnet, self._control_scale = controlnet, scale
        # Any: what diffusers says of its pipelines' arguments leaves out half of what they take.
        self._diffusers_pipelines: dict[bool, Any] = {}

    def choose_lora_scale(self, scale: float) -> None:
        """Multiplies the strengths of all LoRAs from now on."""
        if self._loras and scale != self._lora_scale:
            strengths = [strength * scale for strength in self._loras.values()]
            self._pipeline.set_adapters(list(self._loras), strengths)
        self._lora_scale = scale

    @property
    def pipeline(self) -> KosmosGPipeline:
        """The pipeline that reads the prompts."""
        return self._pipeline

    def choose_scheduler(self, name: str) -> None:
        """Generates with this sampler from now on; names as `noise_schedules.SCHEDULERS`, "saved"
        is the one it was made with. Raises ConfigError for one that the U-Net cannot use."""
        self._scheduler = noise_scheduler(name, self._saved_scheduler)

    def check(self, planned_images: Sequence[PlannedImage]) -> None:
        """Raises PromptError for a size or a prompt length that the model cannot take."""
        unit = math.lcm(SIZE_UNIT, self._pipeline.vae_scale_factor)
        for planned in planned_images:
            if planned.index:
                continue
            record, options = planned.record, planned.options
            for name in SIDES:
                size = getattr(options, name)
                if size is not None and size % unit:
                    raise PromptError(
                        f"{record.id}: {name} {size} is not a multiple of {unit} pixels"
                    )
            # Any: an image counts as many positions as its file.
            prompts: dict[str, Any] = {
                "prompt": record.content,
                "negative prompt": [options.negative_prompt],
            }
            for what, parts in prompts.items():
                try:
                    self._pipeline.prompt_tokens(parts)
                except ValueError as error:
                    said = str(error).removeprefix("prompt 1 ")
                    raise PromptError(f"{record.id}: the {what} {said}") from error

    def generate(
        self, planned_images: Sequence[PlannedImage], on_step: OnStep | None = None
    ) -> list[Image.Image]:
        """The images of a group of records that share `group_key`."""
        firsts = [planned for planned in planned_images if planned.index == 0]
        options = firsts[0].options
        guided = _given(options.guidance) > 1
        embeds, negative_embeds = self._pipeline.encode_prompt(
            [_opened(planned.record) for planned in firsts],
            do_classifier_free_guidance=guided,
            negative_prompt=[_given(p.options.negative_prompt) for p in firsts] if guided else None,
        )
        seeds = [_given(planned.options.seed) for planned in planned_images]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        drawn = self._diffusers_pipeline(options.start_image is not None)(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative_embeds,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            num_images_per_prompt=options.num_images,
            generator=generators,
            output_type="np" if firsts[0].rounds_down else "pil",
            **self._size_and_control(planned_images),
            callback_on_step_end=None if on_step is None else _step_callback(on_step),
        ).images
        if firsts[0].rounds_down:
            return [Image.fromarray((values * 255).astype(np.uint8)) for values in drawn]
        return drawn

    def _diffusers_pipeline(self, has_start: bool) -> Any:
        """The diffusers pipeline to generate with: with a ControlNet or not, from images or
        noise."""
        if has_start not in self._diffusers_pipelines:
            self._diffusers_pipelines[has_start] = self._new_diffusers_pipeline(has_start)
        pipeline = self._diffusers_pipelines[has_start]
        pipeline.scheduler = self._scheduler
        pipeline.set_progress_bar_config(disable=not self._shows_steps, leave=False)
        return pipeline

    def _new_diffusers_pipeline(self, has_start: bool) -> Any:
        pipeline, parts = self._pipeline, {}
        if self._controlnet is not None:
            kind: Any = StableDiffusionControlNetPipeline
            if has_start:
                kind = StableDiffusionControlNetImg2ImgPipeline
            parts = {"controlnet": self._controlnet}
        elif has_start:
            kind = StableDiffusionImg2ImgPipeline
        else:
            return pipeline
        # Not from_pipe, which casts all parts to float32 unless told otherwise.
        return kind(
            vae=pipeline.vae,
            text_encoder=None,
            tokenizer=pipeline.tokenizer,
            unet=pipeline.unet,
            scheduler=self._saved_scheduler,
            safety_checker=pipeline.safety_checker,
            feature_extractor=pipeline.feature_extractor,
            requires_safety_checker=False,
            **parts,
        )

    def _size_and_control(self, planned_images: Sequence[PlannedImage]) -> dict[str, Any]:
        """The arguments of the diffusers pipeline for size, start and control."""
        firsts = [planned for planned in planned_images if planned.index == 0]
        options = firsts[0].options
        arguments: dict[str, Any] = dict(self._size(options))
        has_start = options.start_image is not None
        if self._controlnet is not None:
            controls = [
                open_image_file(_given(planned.options.control_image)) for planned in firsts
            ]
            arguments["control_image" if has_start else "image"] = controls
            arguments["controlnet_conditioning_scale"] = self._control_scale
        if not has_start:
            return arguments | self._shared_noise(planned_images)
        height, width = self._default_size()
        size = (arguments.get("width", width), arguments.get("height", height))
        if self._controlnet is None:  # diffusers takes the size from the image then
            arguments = {}
        # One for each image: of fewer, diffusers repeats the whole list.
        starts = [open_image_file(_given(p.options.start_image)) for p in planned_images]
        arguments["image"] = [ImageOps.fit(image, size) for image in starts]
        return arguments | {"strength": options.strength}

    def _shared_noise(self, planned_images: Sequence[PlannedImage]) -> dict[str, torch.Tensor]:
        """{"latents": [n, 4, h, w]} for images that start from rows of one draw, {} for others.

        Generators of a CPU and of a GPU draw different numbers from one seed.
        """
        rows = [p.record.noise[p.index] for p in planned_images if p.record.noise]
        if not rows:
            return {}
        unet, size = self._pipeline.unet, self._size(planned_images[0].options)
        default = self._default_size()
        sides = [size.get(name, side) for name, side in zip(SIDES, default, strict=True)]
        scale = self._pipeline.vae_scale_factor
        shape = (unet.config.in_channels, *(side // scale for side in sides))
        found = []
        for noise in rows:
            generator = torch.Generator(unet.device).manual_seed(0)
            drawn = torch.randn(
                (noise.num_rows, *shape), generator=generator, device=unet.device, dtype=unet.dtype
            )
            found.append(drawn[noise.row])
        return {"latents": torch.stack(found)}

    def _default_size(self) -> tuple[int, int]:
        """The (height, width) that the model draws by itself."""
        latent = self._pipeline.unet.config.sample_size
        height, width = latent if isinstance(latent, (list, tuple)) else (latent, latent)
        scale = self._pipeline.vae_scale_factor
        return int(height) * scale, int(width) * scale

    def _size(self, options: GenerationOptions) -> dict[str, int]:
        """The arguments height and width, none where the model's own size is meant. diffusers takes
        one alone for none, so the other side is the model's."""
        sides = {"height": options.height, "width": options.width}
        if None not in sides.values() or not any(sides.values()):
            return {name: side for name, side in sides.items() if side is not None}
        default = self._default_size()
        both = zip(sides.items(), default, strict=True)
        return {name: side or size for (name, side), size in both}


def _given(value: Value | None) -> Value:
    """A setting that ImagePlan has given the image, or has refused to do without."""
    assert value is not None, "see image_plan.py"
    return value


def _step_callback(on_step: OnStep) -> Callable[..., dict[str, Any]]:
    """A callback as diffusers calls it, which passes on the number of the step that has ended."""

    def call(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1)
        return tensors

    return call


def _opened(record: PromptRecord) -> Parts:
    return [part if isinstance(part, str) else open_image_file(part) for part in record.content]
