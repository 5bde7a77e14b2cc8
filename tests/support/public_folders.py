"""Stand-ins of folders as they are published: the same classes, names and files, tiny weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.conversion_models import VOCAB_SIZE

GROUNDING_TOKENS = 13
OF_TRANSFORMERS_4 = {
    "_name_or_path": "",
    "bad_words_ids": None,
    "do_sample": False,
    "early_stopping": False,
    "is_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "torch_dtype": None,
    "use_bfloat16": False,
}
"""Settings of the kind that config files of 2023 carry along."""
EMBEDDING = "text_model.model.embed_tokens.weight"


def write_kosmos2(mllm: Path, folder: Path) -> Path:
    """The layout of microsoft/kosmos-2 of a folder of export-mllm: more tokens, the slow
    tokenizer's files, a stray buffer."""
    shutil.copytree(mllm, folder)
    weights = load_file(folder / "model.safetensors")
    table = weights[EMBEDDING]
    weights[EMBEDDING] = torch.cat([table, torch.randn(GROUNDING_TOKENS, table.shape[1])])
    weights["vision_model.model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "vocab_size": VOCAB_SIZE + GROUNDING_TOKENS,
        **OF_TRANSFORMERS_4,
    }
    config |= {"torch_dtype": "float32", "transformers_version": "4.34.0.dev0"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    like = tokenizer["added_tokens"][-1]
    for number in range(GROUNDING_TOKENS):
        extra = {**like, "id": VOCAB_SIZE + number, "content": f"<patch_{number}>"}
        tokenizer["added_tokens"].append(extra)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_half_variant(full: Path, folder: Path) -> Path:
    """A Stable Diffusion whose weights are there as the fp16 variant alone."""
    shutil.copytree(full, folder)
    for path in folder.glob("*/*.safetensors"):
        half = {
            name: value.half() if value.is_floating_point() else value
            for name, value in load_file(path).items()
        }
        save_file(half, path.with_suffix(f".fp16{path.suffix}"), metadata={"format": "pt"})
        path.unlink()
    return folder


def write_pickles(full: Path, folder: Path) -> Path:
    """A Stable Diffusion of before there were safetensors: `.bin` files alone."""
    shutil.copytree(full, folder)
    for path in folder.glob("*/*.safetensors"):
        is_text = path.stem == "model"
        name = "pytorch_model.bin" if is_text else "diffusion_pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    return folder
