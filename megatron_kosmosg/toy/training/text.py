"""Trains the toy CLIPTextModel before it is frozen: its states must name each entity's attributes.

Light linear heads read shapes, patterns and hues of both entities from every token that follows
their phrase, so that colours are bound to their entity before any image is drawn. The heads are
thrown away. Only captions of training combinations are seen.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from megatron_kosmosg.toy.toy_captions import caption
from megatron_kosmosg.toy.training import checkpoint, pool
from megatron_kosmosg.toy.training.clip_tokenizer import END, NUM_POSITIONS, START, token_ids
from megatron_kosmosg.toy.world import PATTERNS, SHAPES, Scene

WIDTH = 96
STATE_NOISE = 0.1
"""Deviation of the noise added to the states, so that heads need a margin."""
IGNORED = -100


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text model for this tokenizer."""
    end = id_of(tokenizer, END)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=NUM_POSITIONS,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=id_of(tokenizer, START),
        eos_token_id=end,
        pad_token_id=end,
    )
    model = CLIPTextModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                parameter.normal_(0, 0.3)
    return model


def id_of(tokenizer: CLIPTokenizer, token: str) -> int:
    """The id of one token; what transformers annotates is that of a list, too."""
    return cast(int, tokenizer.convert_tokens_to_ids(token))


class Heads(nn.Module):
    """Linear readers of a state: two entities' shape, pattern, two hues; background hue; word."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.shape = nn.Linear(WIDTH, 2 * len(SHAPES))
        self.pattern = nn.Linear(WIDTH, 2 * len(PATTERNS))
        self.hues = nn.Linear(WIDTH, 5 * 2)
        self.word = nn.Linear(WIDTH, vocabulary)


def targets(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape and pattern indices [n, 2]; hues as cos, sin [n, 5, 2] and which of them are named.

    Hue order: entity 1 first colour, second colour, entity 2 likewise, background.
    """
    count = len(scenes)
    shape = torch.full((count, 2), IGNORED)
    pattern = torch.full((count, 2), IGNORED)
    hues, named = torch.zeros(count, 5), torch.zeros(count, 5, dtype=torch.bool)
    for i, scene in enumerate(scenes):
        for k, entity in enumerate(scene.entities):
            shape[i, k] = SHAPES.index(entity.shape)
            pattern[i, k] = PATTERNS.index(entity.pattern)
            hues[i, 2 * k], hues[i, 2 * k + 1] = entity.hue_a, entity.hue_b
            named[i, 2 * k], named[i, 2 * k + 1] = True, entity.pattern != "plain"
        if scene.background_hue is None:
            raise ValueError("a white background has no hue to learn")
        hues[i, 4], named[i, 4] = scene.background_hue, True
    angle = hues * (math.pi / 180)
    return shape, pattern, torch.stack([angle.cos(), angle.sin()], -1), named


def readable(ids: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    """Which hues (in the order of `targets`) the words so far have named, bool [n, positions,
    5]."""
    joins = [id_of(tokenizer, word + "</w>") for word in ("and", "on")]
    phrases = torch.isin(ids, torch.tensor(joins)).cumsum(1)
    over = (ids == id_of(tokenizer, END)).cumsum(1)
    return torch.stack([phrases > 0, phrases > 0, phrases > 1, phrases > 1, over > 0], -1)


def train(
    run: Path, folder: Path, tokenizer: CLIPTokenizer, steps: int, learning_rate: float, seed: int
) -> CLIPTextModel:
    """The trained text model, in eval mode and frozen; kept in FOLDER and reused from there."""
    if (folder / "config.json").exists():
        return CLIPTextModel.from_pretrained(folder).eval().requires_grad_(False)
    torch.manual_seed(seed)
    model, heads = build(tokenizer), Heads(len(tokenizer))
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *heads.parameters()],
        lr=learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    start = 0
    if (state := checkpoint.load(run / "text.pt")) is not None:
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    scenes = pool.scenes(seed, 20000, 0.7)
    progress = pool.StepProgress("text", steps, 50, start)
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        batch = [scenes[i] for i in rng.integers(0, len(scenes), 128)]
        captions = [caption(scene, "mix", (seed, step, i)) for i, scene in enumerate(batch)]
        ids = torch.tensor(token_ids(tokenizer, captions))
        losses = losses_of(model, heads, ids, targets(batch), readable(ids, tokenizer))
        decay = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        rate = learning_rate * min(1.0, (step + 1) / 50) * max(decay, 0.02)
        optimizer.param_groups[0]["lr"] = rate
        sum(losses.values(), start=torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(step + 1, **{key: loss.item() for key, loss in losses.items()})
        if (step + 1) % 200 == 0:
            state = {"model": model.state_dict(), "heads": heads.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            checkpoint.save(run / "text.pt", state)
    model.eval().requires_grad_(False).save_pretrained(folder)
    return model


def losses_of(
    model: CLIPTextModel,
    heads: Heads,
    ids: Tensor,
    targets: tuple[Tensor, Tensor, Tensor, Tensor],
    seen: Tensor,
) -> dict[str, Tensor]:
    """Squared error of hues, weighted cross-entropies of shapes, patterns and the token itself."""
    shape, pattern, hues, named = targets
    states = model(ids).last_hidden_state
    states = states + STATE_NOISE * torch.randn_like(states)
    mask = seen & named[:, None]
    error = (heads.hues(states).unflatten(-1, (5, 2)) - hues[:, None]).square().sum(-1)
    entity_seen = seen[..., [0, 2]]

    def labelled(logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels[:, None].expand(-1, logits.shape[1], -1)
        labels = torch.where(entity_seen, labels, IGNORED)
        return cross_entropy(logits.unflatten(-1, (2, -1)).flatten(0, 2), labels.flatten())

    return {
        "hue": error[mask].mean(),
        "shape": 0.5 * labelled(heads.shape(states), shape),
        "pattern": 0.5 * labelled(heads.pattern(states), pattern),
        "word": 0.25 * cross_entropy(heads.word(states).flatten(0, 1), ids.flatten()),
    }
