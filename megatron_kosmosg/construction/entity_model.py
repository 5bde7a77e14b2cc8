"""Entities of captions by an instruction-tuned language model, asked for a JSON list.

The authors sample the answers of MPT-7B-Instruct; here they are greedy, so that an image's record
does not depend on chance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_kosmosg.construction.entity_prompt import CAPTION
from megatron_kosmosg.construction.model_folders import loaded
from megatron_kosmosg.parallel.devices import on_device


class EntityModel:
    """A model folder, opened. Raises ValueError where it cannot be."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        prompt: str,
    ) -> None:
        self._tokenizer = loaded(AutoTokenizer.from_pretrained, folder, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token is None:
            raise ValueError(f"--entities {folder}: the tokenizer has no token to pad or end with")
        model = loaded(AutoModelForCausalLM.from_pretrained, folder, dtype=dtype)
        # Any: transformers' annotation of what it loaded does not fit that of `generate`.
        self._model: Any = on_device(model, device).eval()
        self._max_tokens, self._prompt = max_tokens, prompt

    @torch.inference_mode()
    def __call__(self, captions: list[str]) -> list[str]:
        """The model's answer for each caption, as Answerer asks for."""
        has_template = self._tokenizer.chat_template is not None
        # A template writes the marks of the start itself.
        inputs = self._tokenizer(
            [self._question(caption) for caption in captions],
            return_tensors="pt",
            padding=True,
            add_special_tokens=not has_template,
            return_token_type_ids=False,
        ).to(self._model.device)
        ids = self._model.generate(
            **inputs,
            max_new_tokens=self._max_tokens,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        answers = ids[:, inputs["input_ids"].shape[1] :]
        return self._tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _question(self, caption: str) -> str:
        text = self._prompt.replace(CAPTION, caption)
        if self._tokenizer.chat_template is None:
            return text
        messages = [{"role": "user", "content": text}]
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
