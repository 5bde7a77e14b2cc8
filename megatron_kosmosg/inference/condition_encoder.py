"""The conditions that a model makes of prompts, without its U-Net and VAE.

For programs that draw with a Stable Diffusion of their own, such as the nodes in comfyui/.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from megatron_kosmosg.data.tokenizer import IMAGE as PLACEHOLDER
from megatron_kosmosg.inference.model_source import find_model
from megatron_kosmosg.inference.open_model import open_pipeline


class ConditionEncoder:
    """Language model and aligner, which rest on one device and work on another."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        resting_device: torch.device | None = None,
    ) -> None:
        """path: an exported folder, or a run or checkpoint of align or instruct.

        Args:
            resting_device: where the weights wait between two calls (None: they stay on `device`).

        Raises ConfigError or ConversionError for what cannot be opened.
        """
        self._device, self._resting = device, resting_device or device
        source = find_model(path, draws=False)
        self._pipeline = open_pipeline(source, dtype, self._resting, draws=False)

    def encode(
        self, text: str, images: Sequence[Image.Image], negative: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(condition of the prompt, condition of the negative), each float32 [1, c, d] on the CPU.

        `<image>` in `text` stands where an image goes. The negative is read by the same model: it
        is not CLIP's empty prompt, which lies in another space. Raises ValueError where
        placeholders and images differ in number, and for a prompt of too many positions.
        """
        count = text.count(PLACEHOLDER)
        if count != len(images):
            raise ValueError(
                f"the text has {count} {PLACEHOLDER}, and {len(images)} image(s) are connected: "
                f"write {PLACEHOLDER} once where each image goes"
            )
        self._pipeline.to(self._device)
        try:
            positive, null = self._pipeline.encode_prompt(
                text, images=list(images), negative_prompt=negative, device=self._device
            )
        finally:
            self._pipeline.to(self._resting)
        assert null is not None, "guidance is on unless it is turned off"
        return positive.float().cpu(), null.float().cpu()
