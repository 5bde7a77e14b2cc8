"""Captions by BLIP-2 (the paper's captioner): the likeliest token at every step, from the image
without a question."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForConditionalGeneration

from megatron_kosmosg.construction.model_folders import loaded
from megatron_kosmosg.parallel.devices import on_device


class Blip2Captioner:
    """The Captioner (caption_step.py) of a BLIP-2 in a local folder of transformers.

    Raises ValueError for a folder that cannot be opened.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, max_tokens: int
    ) -> None:
        """max_tokens: of a caption; what is longer is cut."""
        self._tokenizer = loaded(AutoTokenizer.from_pretrained, folder)
        self._processor = loaded(AutoImageProcessor.from_pretrained, folder)
        model = loaded(Blip2ForConditionalGeneration.from_pretrained, folder, dtype=dtype)
        if model.config.image_token_id is None:
            raise ValueError(
                f"--captions {folder}: config.json has no image_token_index; it is of an older "
                "transformers, take the current files of that model"
            )
        self._model = on_device(model, device).eval()
        self._max_tokens = max_tokens

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image]) -> list[str]:
        """A caption for each RGB image, in their order."""
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]
        ids = self._model.generate(
            pixel_values=pixels.to(self._model.device, self._model.dtype),
            max_new_tokens=self._max_tokens,
            do_sample=False,
        )
        # A decoder-only language model (OPT) returns its prompt before its answer: one image token
        # a query and the start token. One with an encoder (T5) returns the answer alone.
        config = self._model.config
        if ids.shape[1] > config.num_query_tokens and (ids[:, 0] == config.image_token_id).all():
            ids = ids[:, config.num_query_tokens + 1 :]
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)
