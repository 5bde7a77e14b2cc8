"""KOSMOS-G as a diffusers pipeline: Stable Diffusion whose condition is read from text and images.

A language model (stock Kosmos-2) and an aligner take the place of CLIP's text encoder; U-Net, VAE
and scheduler are untouched. Long because the file travels with every exported model, so it stands
alone: it imports numpy, torch, diffusers, transformers and Pillow only. It is one file because
diffusers fetches one from a hub. Its annotations are evaluated (no `from __future__ import
annotations`): diffusers before 0.37 reads the types of `__init__`.
"""

import importlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import load_image, logging
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import Kosmos2ForConditionalGeneration, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

PLACEHOLDER = "<image>"
"""A copy, like all that this file shares with the package: it must stand alone."""
PIPELINE_MODULE = "pipeline_kosmosg"
ALIGNER_MODULE = "modeling_kosmosg_aligner"
SENTENCEPIECE_FILE = "sentencepiece.bpe.model"
"""In the tokenizer's folder; transformers itself does not write it."""
PORTABLE = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "CLIPImageProcessorPil": "CLIPImageProcessor",
}
"""What transformers 5 records for two classes -> names that transformers 4 knows as well."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by EXIF's orientation."""

Parts = list[str | Image.Image]
FORMS_OF_IMAGES = (Image.Image, os.PathLike, np.ndarray, torch.Tensor)
"""In a prompt; a string is an image (its path or address) only among `images`."""


class KosmosGPipeline(StableDiffusionPipeline):
    """Images from prompts of text and images.

    A prompt is a string with an `<image>` for each of `images`, or a list of texts and images,
    `["A", dog, "on a beach"]`, in whose texts `<image>` means nothing. A list without any image in
    it is a batch, of either form. Everything else is as in StableDiffusionPipeline. Without its
    language model, aligner and tokenizer (None) it draws from `prompt_embeds`.
    """

    model_cpu_offload_seq = "mllm->aligner->image_encoder->unet->vae"
    _optional_components = [
        *StableDiffusionPipeline._optional_components,
        *("text_encoder", "tokenizer", "mllm", "aligner", "mllm_image_processor"),
    ]

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        mllm: Kosmos2ForConditionalGeneration,
        aligner: ModelMixin,
        mllm_image_processor: Any,
        text_encoder: torch.nn.Module | None = None,
        safety_checker: torch.nn.Module | None = None,
        feature_extractor: Any = None,
        image_encoder: torch.nn.Module | None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        """Puts all models in eval mode: a language model with dropout gives other images."""
        parts: Any = (vae, text_encoder, tokenizer, unet, scheduler)  # annotated as CLIP's alone
        checker: Any = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(*parts, *checker)
        self.register_modules(mllm=mllm, aligner=aligner, mllm_image_processor=mllm_image_processor)
        for component in self.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        if mllm is not None:
            # transformers before 5.23 takes the resampler's queries for text, without an error.
            mllm.image_to_text_projection.x_attn.is_causal = False
            check_resampler(mllm.image_to_text_projection)
        if tokenizer is not None and os.path.isdir(tokenizer.name_or_path):
            # To be found when the pipeline is saved, from whatever folder.
            tokenizer.name_or_path = os.path.abspath(tokenizer.name_or_path)
        self._check_parts()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list | None = None,
        images: Any = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ):
        """Generates images of prompts. Returns StableDiffusionPipelineOutput, or a tuple with
        return_dict=False.

        Args:
            prompt: a string with `<image>` places, a list of texts and images, or a batch of
                either.
            images: for the `<image>` of a string; a batch has a list of them for each prompt. Each
                is a PIL image, a path, an address, an array [h, w, c] or a tensor [c, h, w] (uint8,
                or 0 to 1).

        All other arguments are StableDiffusionPipeline's.
        """
        self._guidance_scale = guidance_scale
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            images=images,
        )
        settings: dict[str, Any] = dict(
            height=height, width=width, num_inference_steps=num_inference_steps,
            timesteps=timesteps, sigmas=sigmas, guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt, eta=eta, generator=generator,
            latents=latents, ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds, output_type=output_type,
            return_dict=return_dict, cross_attention_kwargs=cross_attention_kwargs,
            guidance_rescale=guidance_rescale, clip_skip=clip_skip,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        return super().__call__(
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, **settings
        )

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        images: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds), each [b * num_images_per_prompt, c, d], which
        any pipeline of Stable Diffusion 1.5 takes.

        The negative is a text; without one it is the empty prompt, and None without guidance.
        Embeddings that are given pass through; lora_scale and clip_skip are CLIP's and have no
        meaning here.
        """
        device = device or self._execution_device
        if clip_skip is not None:
            logger.warning("clip_skip is ignored: CLIP's text encoder is not used here")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either `prompt` or `prompt_embeds`")
        if prompt_embeds is None:
            prompt_embeds = self._conditions(as_batch(prompt, images), device)
        elif images is not None:
            raise ValueError("`images` belong to a `prompt`; `prompt_embeds` have read theirs")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give either `negative_prompt` or `negative_prompt_embeds`")
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = negative_batch(negative_prompt, len(prompt_embeds))
            negative_prompt_embeds = self._conditions(negatives, device)
            negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1, -1)
        dtype = prompt_embeds.dtype if self.unet is None else self.unet.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)
        if (negative := negative_prompt_embeds) is not None:
            negative = negative.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)
        return prompt_embeds, negative

    @property
    def _execution_device(self) -> torch.device:
        """The device of the models, also where accelerate offloads only some of them."""
        device = super()._execution_device
        if device.type == "meta":  # of a weight that its hook brings when it is needed
            parts = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
            hooks = (getattr(m, "_hf_hook", None) for part in parts for m in part.modules())
            found = (getattr(hook, "execution_device", None) for hook in hooks)
            device = torch.device(next(where for where in found if where is not None))
        return device

    def _conditions(self, prompts: list[Parts], device: torch.device) -> torch.Tensor:
        """The conditions [b, c, d] of interleaved prompts."""
        needed = ("mllm", "aligner", "tokenizer", "mllm_image_processor")
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(
                f"this pipeline has no {' and no '.join(missing)}; give `prompt_embeds` and "
                "`negative_prompt_embeds`"
            )
        pad = self.tokenizer.pad_token_id
        rows = [self.prompt_tokens(parts, number) for number, parts in enumerate(prompts, start=1)]
        tokens, slots = (
            pad_sequence([torch.tensor(row) for row in side], True, padding).to(device)
            for side, padding in zip(zip(*rows, strict=True), (pad, False), strict=True)
        )
        states = language_states(self.mllm, tokens, slots, self._pixels(prompts, device))
        states = states.to(get_parameter_dtype(self.aligner))
        return self.aligner(states, padding_mask=tokens == pad)

    def prompt_tokens(self, parts: Parts, number: int = 1) -> tuple[list[int], list[bool]]:
        """(token ids, whether each is an image slot) of a prompt. Raises ValueError where the model
        has fewer positions."""
        start, end = self.tokenizer.convert_tokens_to_ids([PLACEHOLDER, "</image>"])
        num_slots = self.mllm.config.latent_query_num
        tokens, slots = [self.tokenizer.bos_token_id], [False]
        for part in parts:
            if isinstance(part, str):
                # Names of special tokens in a text are text like any other.
                ids = self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)
                tokens += ids.input_ids if part.strip() else []
                slots += [False] * (len(tokens) - len(slots))
            else:
                tokens += [start] * (1 + num_slots) + [end]
                slots += [False] + [True] * num_slots + [False]
        limits = [self.mllm.config.text_config.max_position_embeddings, self.aligner.longest_prompt]
        longest = min(limit for limit in limits if limit is not None)
        if len(tokens) > longest:
            raise ValueError(
                f"prompt {number} takes {len(tokens)} positions ({num_slots + 2} an image), this "
                f"model has {longest}: shorten the text or give fewer images"
            )
        return tokens, slots

    def _pixels(self, prompts: list[Parts], device: torch.device) -> torch.Tensor | None:
        """All images of the batch, prompt by prompt, as [n, 3, H, W]; None without any."""
        size = self.mllm.config.vision_config.image_size
        images = [
            resize_and_crop(part, size, f"image {position} of prompt {number}")
            for number, parts in enumerate(prompts, start=1)
            for position, part in enumerate((p for p in parts if not isinstance(p, str)), start=1)
        ]
        if not images:
            return None
        inputs = self.mllm_image_processor(
            images, do_resize=False, do_center_crop=False, return_tensors="pt"
        )
        return inputs.pixel_values.to(device, get_parameter_dtype(self.mllm))

    def _check_parts(self) -> None:
        """ValueError for components that do not fit together."""
        if self.aligner is not None and self.unet is not None:
            reads, makes = self.unet.config.cross_attention_dim, self.aligner.config.hidden_size
            if reads != makes:
                raise ValueError(
                    f"the U-Net reads conditions of width {reads}, the aligner makes {makes}: use "
                    "a U-Net of the Stable Diffusion version that the model was trained with"
                )
        if self.mllm is None or self.tokenizer is None:
            return
        known, expected = len(self.tokenizer), self.mllm.config.text_config.vocab_size
        if known != expected:
            raise ValueError(
                f"the tokenizer knows {known} tokens, the language model {expected}: load the "
                "tokenizer with `from_pretrained` from the model's own folder"
            )

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict: dict, *args: Any, **kwargs: Any) -> None:
        """Warns that a LoRA's part for a text encoder is not used. Raises ValueError for a file
        that holds nothing for the U-Net."""
        count = sum(name.startswith(cls.text_encoder_name) for name in state_dict)
        if count == len(state_dict):
            raise ValueError(
                f"all {count} tensors of this LoRA change CLIP's text encoder, none the U-Net"
            )
        if count:
            logger.warning(
                f"left out {count} of the LoRA's {len(state_dict)} tensors: they change CLIP's "
                "text encoder, which is not used here; the U-Net's are loaded"
            )

    def load_textual_inversion(self, *args: Any, **kwargs: Any) -> None:
        """Warns that textual inversions have no effect, and loads nothing."""
        logger.warning("textual inversion is ignored: CLIP's text encoder is not used here")

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any):
        """The pipeline of diffusers' from_pipe, with the aligner, whose class that does not
        know."""
        if getattr(pipeline, "aligner", None) is not None:
            kwargs.setdefault("aligner", pipeline.aligner)
        return super().from_pipe(pipeline, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any):
        """The folder's model_index.json; an installed package's own classes need no trust flag."""
        loaded = super().load_config(*args, **kwargs)
        package = __name__.rpartition(".")[0]
        if not package or package.startswith("diffusers_modules"):
            return loaded
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        # diffusers takes classes of modules that are imported already.
        aligner = importlib.import_module(f"{package}.{ALIGNER_MODULE}")
        index["_class_name"] = cls.__name__
        if index.get("aligner", [None])[0] is not None:
            index["aligner"] = [aligner.__name__, aligner.KosmosGAligner.__name__]
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes a folder that loads with and without the package, as `export-hf` does."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save to a folder, then upload that: `hf upload REPOSITORY FOLDER`")
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        shutil.copyfile(__file__, folder / f"{PIPELINE_MODULE}.py")
        if self.aligner is not None:  # torch.compile wraps it in a class of torch's
            source = inspect.getfile(type(getattr(self.aligner, "_orig_mod", self.aligner)))
            shutil.copyfile(source, folder / "aligner" / f"{ALIGNER_MODULE}.py")
        if self.tokenizer is not None:
            source, saved = Path(self.tokenizer.name_or_path), folder / "tokenizer"
            complete_tokenizer(saved)
            copy_own_file(source / SENTENCEPIECE_FILE, saved / SENTENCEPIECE_FILE)
            if (source.parent / self.config_name).is_file():  # a pipeline's: it has a model card
                copy_own_file(source.parent / "README.md", folder / "README.md")
        path = folder / self.config_name
        index = portable_index(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_resampler(resampler: Any) -> None:
    """RuntimeError unless its first query sees the last patch: nothing else would tell."""
    like = resampler.latent_query
    if like.is_meta or like.dtype.itemsize == 1:  # offloaded, or in a form that only hooks read
        return
    pair = torch.zeros(2, 2, resampler.dense.in_features, dtype=like.dtype, device=like.device)
    pair[1, 1] = 1  # two images, which differ in their last patch
    with torch.no_grad():
        first, second = resampler(pair)[0][:, 0]
    if torch.equal(first, second):
        raise RuntimeError(
            f"transformers {transformers.__version__} hides patches of an image from the language "
            "model: its conditions would be those of other images. Install a version that the "
            "model's README.md lists"
        )


def language_states(
    mllm: Kosmos2ForConditionalGeneration,
    tokens: torch.Tensor,
    image_mask: torch.Tensor,
    pixel_values: torch.Tensor | None,
) -> torch.Tensor:
    """The language model's states [b, s, h] after the final LayerNorm: what the aligner reads.

    tokens [b, s], padded at the end; image_mask bool [b, s], True = image slot; pixel_values
    [n, 3, H, W] fill the slots row by row, None where there is no image.
    """
    images = {"pixel_values": pixel_values}
    if pixel_values is None:  # stock Kosmos-2 asks for images: give it none
        text: Any = mllm.config.text_config  # an object, whatever may be given to make it
        shape = (0, mllm.config.latent_query_num, text.embed_dim)
        dtype = get_parameter_dtype(mllm)
        images = {"image_embeds": torch.zeros(shape, dtype=dtype, device=tokens.device)}
    # No attention mask: a causal model does not see padding at the end.
    return mllm(
        **images,
        input_ids=tokens,
        image_embeds_position_mask=image_mask,
        output_hidden_states=True,
        logits_to_keep=1,
        use_cache=False,
    ).hidden_states[-1]


def copy_own_file(source: Path, target: Path) -> None:
    """Copies a file if it is there. A link is followed only inside its folder and into the `blobs`
    of a hub's cache: what else it may point at is not for others to have."""
    path, folder = source.resolve(), source.parent.resolve()
    blobs = [parent / "blobs" for parent in folder.parents]
    if path.is_file() and path.parent in [folder, *blobs]:
        if not (target.exists() and target.samefile(path)):
            shutil.copyfile(path, target)


def complete_tokenizer(saved: Path) -> None:
    """Writes a saved tokenizer's settings as `export-hf` does, with names for transformers 4."""
    file = saved / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for installed in ("is_local", "local_files_only"):
        settings.pop(installed, None)
    name = settings["tokenizer_class"]
    if name in PORTABLE:
        settings["tokenizer_class"] = PORTABLE[name]
        if "extra_special_tokens" in settings:
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def portable_index(index: dict) -> dict:
    """A model_index.json that names the two files in the folder instead of this installation."""
    parts = {name: value for name, value in index.items() if isinstance(value, (list, tuple))}
    parts = {name: [value[0], PORTABLE.get(value[1], value[1])] for name, value in parts.items()}
    if parts.get("aligner", [None])[0] is not None:
        parts["aligner"][0] = ALIGNER_MODULE
    index = {**index, **parts, "_class_name": [PIPELINE_MODULE, KosmosGPipeline.__name__]}
    index.pop("_name_or_path", None)
    return index


def as_batch(prompt: str | list | None, images: Any) -> list[Parts]:
    """The prompts as interleaved lists, images in their places.

    Raises ValueError when placeholders and images differ in number, TypeError for other things.
    """
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    elif images is not None and not isinstance(images, (list, tuple)):
        images = [images]
    if isinstance(prompt, str):
        return [interleave(prompt, list(images or []), 1)]
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise TypeError(f"a prompt is a string or a list, not {prompt!r}")
    if any(isinstance(item, FORMS_OF_IMAGES) for item in prompt):
        prompt = [prompt]
    images = images or [None] * len(prompt)
    if len(images) != len(prompt):
        raise ValueError(
            f"{len(prompt)} prompts, but {len(images)} entries in `images`: give a list for each"
        )
    batch = []
    for number, (item, shown) in enumerate(zip(prompt, images, strict=True), start=1):
        shown = [] if shown is None else shown
        shown = list(shown) if isinstance(shown, (list, tuple)) else [shown]
        if isinstance(item, str):
            batch.append(interleave(item, shown, number))
        elif shown:
            raise ValueError(f"prompt {number} is a list and holds its images; leave out `images`")
        else:
            parts = item if isinstance(item, (list, tuple)) else [item]
            batch.append([p if isinstance(p, str) else as_image(p, number) for p in parts])
    return batch


def interleave(text: str, images: list, number: int) -> Parts:
    """The pieces of `text` with an image in the place of each placeholder."""
    pieces = text.split(PLACEHOLDER)
    if len(pieces) - 1 != len(images):
        raise ValueError(
            f"prompt {number} has {len(pieces) - 1} {PLACEHOLDER} placeholders, but "
            f"{len(images)} images were given: write {PLACEHOLDER} where each image goes (in a "
            'list, [["..."]], it is text)'
        )
    parts: Parts = [pieces[0]]
    for image, piece in zip(images, pieces[1:], strict=True):
        parts += [as_image(image, number), piece]
    return parts


def as_image(image: Any, number: int) -> Image.Image:
    """The PIL image of whatever diffusers takes for one; ValueError or TypeError for the rest."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, os.PathLike)):
        place = os.fspath(image)
        try:
            if place.startswith(("http://", "https://")):
                return load_image(place, lambda image: image)
            return Image.open(place)
        except (OSError, ValueError) as error:
            raise ValueError(f"prompt {number}: {place!r} cannot be read: {error}") from error
    if isinstance(image, torch.Tensor):
        image = image.detach().float() if image.is_floating_point() else image
        image = (image.movedim(0, -1) if image.ndim == 3 else image).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"prompt {number}: {image!r} is no image: give a PIL image, a path, an address, an "
            "array [h, w, c] or a tensor [c, h, w]"
        )
    found = f"prompt {number}: an image is an array of shape {list(image.shape)} and {image.dtype}"
    if np.issubdtype(image.dtype, np.floating):
        if not (image.min(initial=0) >= 0 and image.max(initial=0) <= 1):  # NaN is neither
            raise ValueError(f"{found} with values outside of 0 to 1")
        image = (image * 255).round().astype(np.uint8)
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(
            f"{found}: needed are [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] as uint8 "
            "or 0 to 1 (tensors: channels first)"
        )
    return Image.fromarray(image if channels > 1 else image.reshape(image.shape[:2]))


def negative_batch(negative_prompt: str | list[str] | None, batch_size: int) -> list[Parts]:
    """The negatives as prompts: one for all, or one for each."""
    if negative_prompt is None:
        return [[]]
    if isinstance(negative_prompt, str):
        return [[negative_prompt]]
    if not all(isinstance(text, str) for text in negative_prompt):
        raise TypeError("a negative prompt is a string, or a list of strings: it has no images")
    if len(negative_prompt) != batch_size:
        raise ValueError(f"{len(negative_prompt)} negative prompts for {batch_size} prompts")
    return [[text] for text in negative_prompt]


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as training reads images: upright by EXIF, white where transparent, 16 bits scaled
    to 8."""
    # Pillow before 12 opens a PNG of 16 bits as one of 32.
    is_16_bit = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
    if image.mode == "CMYK":
        raise ValueError("the image is CMYK")
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(f"the image has more than 16 bits a channel: {image.mode}")
    if is_16_bit and "transparency" in image.info:
        raise ValueError("the image has 16 bits and a transparent level")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError("the image is animated")
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(0x112, 1))
    except Exception:  # noqa: BLE001 - Pillow raises anything on a damaged note
        turn = None
    image = image if turn is None else image.transpose(turn)
    if is_16_bit:
        image = image.convert("I").point(lambda level: level / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.composite(image, white, image.getchannel("A"))
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, size: int, name: str) -> Image.Image:
    """The middle square of side `size`, as in training; image processors round otherwise."""
    try:
        image = upright_rgb(image)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise
        raise ValueError(f"{name} cannot be read: {error}") from error
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) > 4 * size:  # mostly cut off: only what is kept is resized
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))
