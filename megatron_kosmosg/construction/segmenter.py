"""Where named things are, by CLIPSeg (the paper's segmenter)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPSegForImageSegmentation

from megatron_kosmosg.construction.model_folders import loaded
from megatron_kosmosg.parallel.devices import on_device


class ClipSegmenter:
    """A model folder, opened. Raises ValueError where it cannot be."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._tokenizer = loaded(AutoTokenizer.from_pretrained, folder)
        self._processor = loaded(AutoImageProcessor.from_pretrained, folder)
        model = loaded(CLIPSegForImageSegmentation.from_pretrained, folder, dtype=dtype)
        self._model = on_device(model, device).eval()

    @torch.inference_mode()
    def __call__(self, named: Sequence[tuple[Image.Image, str]]) -> list[np.ndarray]:
        """The maps that Segmenter asks for, as large as the images: CLIPSeg's are enlarged
        bilinearly."""
        device = self._model.device
        texts = self._tokenizer(
            [name for _, name in named], return_tensors="pt", padding=True, truncation=True
        ).to(device)
        # Entities of one image stand together: it is prepared once.
        different = [
            image for i, (image, _) in enumerate(named) if i == 0 or image is not named[i - 1][0]
        ]
        number = np.cumsum([i > 0 and one[0] is not named[i - 1][0] for i, one in enumerate(named)])
        pixels = self._processor(images=different, return_tensors="pt")["pixel_values"]
        pixels = pixels[torch.from_numpy(number)].to(device, self._model.dtype)
        logits = self._model(**texts, pixel_values=pixels).logits
        maps = torch.sigmoid(logits.float().reshape(len(named), 1, *logits.shape[-2:]))
        return [_enlarged(one, image) for one, (image, _) in zip(maps, named, strict=True)]


def _enlarged(probability: torch.Tensor, image: Image.Image) -> np.ndarray:
    size = (image.height, image.width)
    enlarged = torch.nn.functional.interpolate(probability[None], size, mode="bilinear")
    return enlarged[0, 0].cpu().numpy()
