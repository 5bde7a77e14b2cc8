"""The image decoder's own text encoder, asked the same way as a trained model."""

from __future__ import annotations

from typing import cast

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from megatron_kosmosg.inference.trained_model import TrainedModel
from megatron_kosmosg.toy.evaluation.toy_prompts import Parts


class TextEncoderModel:
    """The image decoder's own text encoder behind the interface of `TrainedModel.conditions`."""

    def __init__(self, folder: str) -> None:
        self._encoder = CLIPTextModel.from_pretrained(
            f"{folder}/text_encoder", dtype=torch.float32
        ).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")

    @torch.no_grad()
    def conditions(self, prompts: list[Parts]) -> tuple[torch.Tensor, torch.Tensor]:
        """(conditions [n, c, d], null condition [1, c, d]) of prompts of words alone."""
        captions = [" ".join(cast(list[str], parts)) for parts in prompts]
        tokens = self._tokenizer(
            [*captions, ""],
            padding="max_length",
            max_length=self._encoder.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states = self._encoder(tokens).last_hidden_state
        return states[:-1], states[-1:]


class WithUnconditional:
    """A model's conditions, guided away from another model's null condition instead of its own.

    `align` never shows AlignerNet an empty prompt (nor do the authors); only `instruct` teaches the
    null condition. What `align` learnt is therefore judged with the text encoder's.
    """

    def __init__(self, model: TrainedModel, unconditional: TextEncoderModel) -> None:
        self._model, self._unconditional = model, unconditional

    def conditions(self, prompts: list[Parts]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the model's conditions [n, c, d], the other's null condition [1, c, d])."""
        return self._model.conditions(prompts)[0], self._unconditional.conditions([])[1]
