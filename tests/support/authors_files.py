"""Checkpoints in the authors' container, made of the golden weights: stage 1, stage 2 and final."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

HEADS = ["model.vision.num_attention_heads=2", "model.aligner.num_attention_heads=4"]
"""Of the golden models; their weights do not show them."""
_FOLDER = Path(__file__).parents[1] / "golden"
_TOWER = "img_model.visual."

Tensors = dict[str, torch.Tensor]


def load_golden(index: int) -> dict:
    """Golden file 1 or 2."""
    return torch.load(_FOLDER / f"official_tiny_{index}.pt", weights_only=True)


def weights_of(golden: dict, file: str) -> Tensors:
    """What `file` ("stage1", "stage2" or "final") holds, with the frozen parts it carries along."""
    model = dict(golden["model"])
    if file == "stage1":
        return {name: t for name, t in model.items() if not name.startswith("aligner.")}
    if file == "stage2":
        return model | {"aligner.clip_encoder.text_model.final_layer_norm.bias": torch.ones(3)}
    unet = {f"diffusion_unet.unet.{name}": value for name, value in golden["unet"].items()}
    vae = {"vae.vae.encoder.conv_in.bias": torch.ones(3)}
    kept = {n: t for n, t in model.items() if not n.startswith("aligner.decoder")}
    return kept | unet | vae


def fuse_tower(tensors: Tensors) -> Tensors:
    """The same with OpenAI's fused attention in the image tower."""
    fused = {}
    for name, value in tensors.items():
        block, marker, rest = name.partition(".ts_attn.")
        if not marker:
            fused[name] = value
        elif rest.startswith("out_proj"):
            fused[f"{block}.attn.{rest}"] = value
        elif rest.startswith("q_proj"):
            end = rest.removeprefix("q_proj.")
            parts = [tensors[f"{block}.ts_attn.{part}_proj.{end}"] for part in "qkv"]
            fused[f"{block}.attn.in_proj_{end}"] = torch.cat(parts)
    return fused


def without_tower(tensors: Tensors) -> Tensors:
    """The same without an image tower."""
    return {name: value for name, value in tensors.items() if not name.startswith(_TOWER)}


def clip_file(path: Path, golden: dict, wrap: Callable[[Tensors], dict] = dict) -> Path:
    """OpenAI's CLIP state dict with the golden tower; wrap: how it is put into the file."""
    tower = {n: t for n, t in golden["model"].items() if n.startswith(_TOWER)}
    clip = {n.removeprefix("img_model."): t for n, t in fuse_tower(tower).items()}
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(2), "logit_scale": torch.ones(())}
    torch.save(wrap(clip | text | {"visual.proj": torch.ones(2, 2)}), path)
    return path


def write_file(path: Path, tensors: Tensors, golden: dict, **entries) -> Path:
    """A fairseq checkpoint with these weights; entries replace others of the container."""
    content = {
        "args": None,
        "cfg": golden["cfg"],
        "model": tensors,
        "criterion": None,
        "optimizer_history": [{"num_updates": 7, "optimizer_name": "FairseqAdam"}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1}},
        **entries,
    }
    torch.save(content, path)
    return path
