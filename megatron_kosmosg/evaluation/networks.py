"""The networks that score images: which files they are read from, and features of what they see.

All compute in float32, without the shorter mantissa that GPUs take for convolutions by themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from megatron_kosmosg.checkpoint.plain_data import read_plain
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.untrusted_folders import check_model_config
from megatron_kosmosg.evaluation.dino import DinoViTS16
from megatron_kosmosg.evaluation.inception import FidInception
from megatron_kosmosg.evaluation.preprocessing import PixelRule, clip_pixels, dino_pixels
from megatron_kosmosg.foreign_files import read_json

INCEPTION_SHA256_HEAD = "6726825d"
"""Of the published file, which torch-fidelity and pytorch-fid distribute under two names."""
CLIP_SIDE = 224
_CLIP_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CLIP_TOKENIZERS = ("tokenizer.json", "vocab.json")


class ImageNetwork(Protocol):
    """A network on its device that turns images into features."""

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The features of pixels [n, 3, side, side], float32 [n, d] on the CPU."""
        ...


@dataclass(frozen=True)
class Weights:
    """The files of a network, which were found to be there."""

    network: str
    path: Path
    sha256: str
    is_published: bool | None = None
    """Whether it is the file that everyone uses; None where no hash of it is known."""

    def described(self) -> dict[str, Any]:
        """What the result says of the weights; not where they lie."""
        found: dict[str, Any] = {"file": self.path.name, "sha256": self.sha256}
        if self.is_published is not None:
            found["is_published"] = self.is_published
        return found


def find_dino(path: Path) -> Weights:
    """The weights in `dino_deitsmall16_pretrain.pth`, under any name. Raises ConfigError where
    there is no file."""
    return Weights("dino", path, _sha256(path, "--dino", "dino_deitsmall16_pretrain.pth"))


def find_inception(path: Path) -> Weights:
    """The .pth of FID. Raises ConfigError for no file, and for one that bears the published name
    and is another: a download that was cut short, say."""
    expected = f"weights-inception-2015-12-05-{INCEPTION_SHA256_HEAD}.pth"
    digest = _sha256(path, "--inception", expected)
    is_published = digest.startswith(INCEPTION_SHA256_HEAD)
    if INCEPTION_SHA256_HEAD in path.name and not is_published:
        raise ConfigError(
            f"--inception {path}: its sha256 begins with {digest[:8]}, not with "
            f"{INCEPTION_SHA256_HEAD} as its name says; get the file again"
        )
    return Weights("inception", path, digest, is_published)


def find_clip(folder: Path) -> Weights:
    """A CLIP model in transformers' form. Raises ConfigError where a file of it is not there."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--clip {folder}: no config.json there; give the folder of "
            "openai/clip-vit-base-patch32"
        )
    weights = [folder / name for name in _CLIP_WEIGHTS if (folder / name).is_file()]
    if not weights or not any((folder / name).is_file() for name in _CLIP_TOKENIZERS):
        needed = " or ".join(_CLIP_WEIGHTS if not weights else _CLIP_TOKENIZERS)
        raise ConfigError(f"--clip {folder}: no {needed} there")
    check_model_config(folder / "config.json")
    config = read_json(folder / "config.json")
    vision = config.get("vision_config") if isinstance(config, dict) else None
    side = vision.get("image_size", CLIP_SIDE) if isinstance(vision, dict) else None
    if side != CLIP_SIDE:
        raise ConfigError(
            f"--clip {folder}: config.json is not that of a CLIP model for images of {CLIP_SIDE} "
            f"pixels (vision_config.image_size {side}); give openai/clip-vit-base-patch32"
        )
    return Weights("clip", weights[0], _sha256(weights[0], "--clip", "a weight file"))


class DinoNetwork:
    """The `ImageNetwork` of DINO's features."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Raises ConfigError for a file of other weights."""
        self._device = device
        self._model = _filled(DinoViTS16(), weights.path, "DINO's ViT-S/16").to(device)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        with exact_convolutions():
            return self._model(pixels.to(self._device)).cpu()


class InceptionNetwork:
    """The `ImageNetwork` of FID's features."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Raises ConfigError for a file of other weights."""
        self._device = device
        model = _filled(FidInception(), weights.path, "FID's Inception of 2015-12-05")
        self._model = model.to(device)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        with exact_convolutions():
            return self._model(pixels.to(self._device)).cpu()


class ClipNetwork:
    """An `ImageNetwork` that reads texts, too; transformers' own classes compute both."""

    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Raises ConfigError for a folder that transformers cannot open."""
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder, self._device = weights.path.parent, device
        try:
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
            self._tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"--clip {folder} cannot be opened: {reason[0]}") from error
        self._model = model.to(device, torch.float32).eval().requires_grad_(False)
        self._most_tokens = int(model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        with exact_convolutions():
            found = self._model.get_image_features(pixel_values=pixels.to(self._device))
        return found.pooler_output.cpu()

    def reads(self, text: str) -> bool:
        """Whether the text has no more tokens than CLIP takes."""
        return len(self._tokenizer(text)["input_ids"]) <= self._most_tokens

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """The features of texts, float32 [n, d] on the CPU. Raises ConfigError for a text that is
        too long: nothing of it may be left out unsaid."""
        batch = self._tokenizer(list(texts), padding=True, return_tensors="pt").to(self._device)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for text, length in zip(texts, lengths, strict=True):
            if length > self._most_tokens:
                raise ConfigError(
                    f"the text {text[:40]!r}... has {length} tokens; CLIP reads {self._most_tokens}"
                )
        return self._model.get_text_features(**batch).pooler_output.cpu()


def open_network(weights: Weights, device: torch.device) -> ImageNetwork:
    """Raises ConfigError for files that are not what they should be."""
    classes = {"dino": DinoNetwork, "clip": ClipNetwork, "inception": InceptionNetwork}
    return classes[weights.network](weights, device)


IMAGE_RULES: dict[str, PixelRule] = {"dino": dino_pixels, "clip": clip_pixels}
"""What a network sees, where the protocol of FID does not say it."""


def exact_convolutions() -> AbstractContextManager[None]:
    """Context in which cuDNN computes in whole float32, with the same algorithm every time."""
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


def _filled(model: nn.Module, path: Path, what: str) -> nn.Module:
    """The model with a file's weights, in eval mode. Raises ConfigError where names or shapes are
    not those of `what`."""
    found = read_plain(path)
    expected = model.state_dict()
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}, not the weights of {what}")
    # Counters of training, which older files do not have.
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    problems = [name for name in expected.keys() - found.keys() if name not in counters]
    problems += list(found.keys() - expected.keys())
    problems += [
        name
        for name in expected.keys() & found.keys() - counters
        if not isinstance(found[name], torch.Tensor) or found[name].shape != expected[name].shape
    ]
    if problems:
        raise ConfigError(
            f"{path} does not hold the weights of {what}: {len(problems)} names are missing, left "
            f"over or of another shape, among them {min(map(str, problems))}"
        )
    model.load_state_dict({**expected, **found})
    return model.float().eval().requires_grad_(False)


def _sha256(path: Path, option: str, expected: str) -> str:
    if not path.is_file():
        raise ConfigError(f"{option} {path}: no such file; give {expected}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
