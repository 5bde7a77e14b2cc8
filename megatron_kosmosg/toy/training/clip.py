"""Trains the toy image tower the way CLIP is trained: images against captions, no labels.

Scenes and subject crops of training combinations, each with a caption of coarse and fine words;
symmetric cross-entropy over the pairs of a batch. The image's embedding is the mean of all
post-normed tokens, because the model reads all of them and not the class token alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from megatron_kosmosg.toy.toy_captions import ALL_WORDS, caption
from megatron_kosmosg.toy.training import checkpoint, pool
from megatron_kosmosg.toy.world import IMAGE_SIZE, Scene

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
EMBEDDING_WIDTH = 96
TEXT_WIDTH = 96
MAX_WORDS = 20
POOL_SIZE = 24000
SUBJECT_EVERY = 2
MAX_LOGIT_SCALE = math.log(100.0)
WORD_IDS = {word: i + 1 for i, word in enumerate(dict.fromkeys(ALL_WORDS))}


def build() -> CLIPVisionModel:
    """An untrained tower: 16 patches and a class token, 4 blocks 128 wide."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=8,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
            attention_dropout=0.0,
        )
    )


def normalise(pixels: Tensor) -> Tensor:
    """Tower input [n, 3, h, w] of uint8 images."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    return (pixels.float() / 255.0 - mean) / std


def tokens(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Post-normed tokens [n, 17, 128] of uint8 images, class token first."""
    hidden = tower.pre_layrnorm(tower.embeddings(normalise(pixels)))
    return tower.post_layernorm(tower.encoder(inputs_embeds=hidden).last_hidden_state)


class TextTower(nn.Module):
    """Word ids [n, MAX_WORDS], 0 = none, to caption embeddings; used in this training only."""

    def __init__(self) -> None:
        super().__init__()
        width = TEXT_WIDTH
        self.words = nn.Embedding(len(WORD_IDS) + 1, width, padding_idx=0)
        self.positions = nn.Parameter(0.1 * torch.randn(MAX_WORDS, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.projection = nn.Linear(width, EMBEDDING_WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        absent = ids == 0
        states = self.layers(self.words(ids) + self.positions, src_key_padding_mask=absent)
        present = (~absent)[..., None]
        return self.projection((states * present).sum(1) / present.sum(1))


class Pair(nn.Module):
    """The image tower, the text tower and the temperature of the comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = build(), TextTower()
        self.projection = nn.Linear(128, EMBEDDING_WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1.0 / 0.07)))

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and the share of images whose own caption is the nearest."""
        seen = F.normalize(self.projection(tokens(self.vision, pixels).mean(1)), dim=-1)
        read = F.normalize(self.text(ids), dim=-1)
        logits = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * seen @ read.T
        labels = torch.arange(len(ids))
        loss = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))
        return loss, (logits.argmax(1) == labels).float().mean()


def word_ids(captions: list[str]) -> Tensor:
    """The ids of captions made of toy words, int64 [n, MAX_WORDS]."""
    ids = torch.zeros(len(captions), MAX_WORDS, dtype=torch.long)
    for row, words in enumerate(captions):
        found = [WORD_IDS[word] for word in words.split()]
        ids[row, : len(found)] = torch.tensor(found)
    return ids


def caption_of(scene: Scene, index: int, step: int, seed: int) -> str:
    """Fine words in every second step's captions, else a mixture."""
    return caption(scene, "fine" if (index + step) % 2 else "mix", (seed, step, index))


def train(run: Path, steps: int, batch_size: int, learning_rate: float, seed: int) -> Pair:
    """The trained pair; continues from RUN/clip.pt and leaves its result there."""
    torch.manual_seed(seed)
    model = Pair()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    start = 0
    if (state := checkpoint.load(run / "clip.pt")) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    scenes = pool.scenes(seed + 1, POOL_SIZE, 0.5)
    scenes = pool.with_subjects(seed + 1, scenes, SUBJECT_EVERY)
    images = pool.images(scenes)
    progress = pool.StepProgress("clip", steps, 20, start)
    for step in range(start, steps):
        rows = np.random.default_rng((seed, step)).integers(0, len(scenes), batch_size)
        captions = [caption_of(scenes[row], i, step, seed) for i, row in enumerate(rows)]
        loss, accuracy = model(images[rows], word_ids(captions))
        decay = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        rate = learning_rate * min(1.0, (step + 1) / 50) * max(decay, 0.02)
        optimizer.param_groups[0]["lr"] = rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(step + 1, loss=loss.item(), own_caption=accuracy.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(run / "clip.pt", state | {"step": step + 1})
    return model.eval()


def export(model: Pair, folder: Path) -> None:
    """Writes the tower in fp16 safetensors with its config and preprocessor_config.json."""
    with checkpoint.replaced_folder(folder) as temporary:
        tower = build()
        tower.load_state_dict(model.vision.state_dict())
        tower.half().save_pretrained(temporary)
        preprocessor = {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": IMAGE_MEAN,
            "image_std": IMAGE_STD,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": IMAGE_SIZE},
        }
        text = json.dumps(preprocessor, indent=2) + "\n"
        (temporary / "preprocessor_config.json").write_text(text, encoding="utf-8")
