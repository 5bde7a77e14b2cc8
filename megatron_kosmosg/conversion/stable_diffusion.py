"""The frozen parts of an export: a Stable Diffusion folder checked against AlignerNet, and copied.

Only U-Net, VAE and scheduler are used; their weights are read from safetensors files.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.frozen_weights import one_file_advice, pickles_advice
from megatron_kosmosg.config.schema import AlignerConfig
from megatron_kosmosg.conversion.exported_folder import read_model_json
from megatron_kosmosg.conversion.safetensors_files import (
    DIFFUSERS,
    SafetensorsFolder,
    write_safetensors,
)
from megatron_kosmosg.conversion.tensors import InDtype
from megatron_kosmosg.progress import ProgressCallback

_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
SCHEDULER_FILE = "scheduler_config.json"


class StableDiffusion:
    """The parts of a diffusers folder that an export takes over.

    Raises ConversionError when something is missing, of another class, or does not fit AlignerNet.
    """

    def __init__(self, folder: Path, aligner: AlignerConfig) -> None:
        advice = one_file_advice(str(folder))
        if advice is not None:
            raise ConversionError(f"{folder} {advice}")
        self._folder = folder
        self._configs = {part: self._config(part, "config.json") for part in _CLASSES}
        self._scheduler = self._config("scheduler", SCHEDULER_FILE)
        for part, expected in _CLASSES.items():
            found = self._configs[part].get("_class_name")
            if found != expected:
                raise ConversionError(f"{folder / part} is a {found}, a {expected} is needed")
        found = str(self._scheduler.get("_class_name"))
        if not issubclass(getattr(diffusers, found, object), diffusers.SchedulerMixin):
            raise ConversionError(
                f"{folder / 'scheduler'} is a {found}, which is no scheduler of the installed "
                f"diffusers {diffusers.__version__}"
            )
        self._check_fit(aligner)
        self._weights = {
            part: SafetensorsFolder(folder / part, self._stem(part)) for part in _CLASSES
        }

    @property
    def index(self) -> dict[str, list[str]]:
        """The entries of these parts in model_index.json."""
        entries = {part: ["diffusers", name] for part, name in _CLASSES.items()}
        return {**entries, "scheduler": ["diffusers", self._scheduler["_class_name"]]}

    def write(
        self, output: Path, dtype: torch.dtype | None, progress: ProgressCallback | None
    ) -> dict[str, str]:
        """Copies the parts into `output`; dtype None keeps theirs. {part: how much it is}"""
        written = {}
        for part, weights in self._weights.items():
            (output / part).mkdir()
            shutil.copyfile(self._folder / part / "config.json", output / part / "config.json")
            written[part] = write_safetensors(
                output / part, DIFFUSERS, InDtype(weights, dtype), progress
            )
        (output / "scheduler").mkdir()
        shutil.copyfile(
            self._folder / "scheduler" / SCHEDULER_FILE, output / "scheduler" / SCHEDULER_FILE
        )
        return written

    def _check_fit(self, aligner: AlignerConfig) -> None:
        unet, vae = self._configs["unet"], self._configs["vae"]
        width = unet.get("cross_attention_dim")
        if width != aligner.hidden_size:
            raise ConversionError(
                f"the U-Net in {self._folder} reads conditions of width {width}, AlignerNet makes "
                f"width {aligner.hidden_size}; give the Stable Diffusion that the model was "
                "trained with, or one of the same shape (768: any Stable Diffusion 1.x)"
            )
        if unet.get("in_channels") != vae.get("latent_channels"):
            raise ConversionError(
                f"the U-Net in {self._folder} takes {unet.get('in_channels')} channels, the VAE "
                f"makes {vae.get('latent_channels')}; inpainting U-Nets and the like do not fit"
            )
        text = self._folder / "text_encoder" / "config.json"
        if not text.is_file():
            return
        positions = read_model_json(text).get("max_position_embeddings")
        if positions != aligner.num_queries:
            raise ConversionError(
                f"the U-Net in {self._folder} was trained on conditions of {positions} positions "
                f"(its text encoder's), AlignerNet makes {aligner.num_queries}; give the Stable "
                "Diffusion that the model was trained with, or one of the same shape"
            )

    def _config(self, part: str, file: str) -> dict[str, Any]:
        path = self._folder / part / file
        if not path.is_file():
            raise ConversionError(
                f"no {path}; --stable-diffusion takes a folder in diffusers' layout, with "
                "unet/, vae/ and scheduler/"
            )
        return read_model_json(path)

    def _stem(self, part: str) -> str:
        """Prefers the files of full precision to the `.fp16` variant."""
        for stem in (DIFFUSERS, f"{DIFFUSERS}.fp16"):
            names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
            if any((self._folder / part / name).is_file() for name in names):
                return stem
        advice = pickles_advice(self._folder / part)
        if advice is not None:
            raise ConversionError(f"{self._folder / part} {advice}")
        raise ConversionError(
            f"{self._folder / part} has no {DIFFUSERS}.safetensors; open and save the folder once "
            "with diffusers (from_pretrained, save_pretrained) to get safetensors files"
        )
