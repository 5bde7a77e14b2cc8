"""What an exported folder makes of recorded prompts, in a process of its own.

usage: python export_embeds.py {package,folder} EXPORT PROMPTS.json OUT.json
`package` loads it with this package's pipeline, `folder` with the two modules that lie in it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image


def main(way: str, export: Path, prompts: Path, out: Path) -> None:
    """Writes OUT.json: prompt_embeds and negative_prompt_embeds."""
    request = json.loads(prompts.read_text())
    with tempfile.TemporaryDirectory() as modules, torch.no_grad():
        pipeline = load(way, export, modules)
        parts = [
            [Image.open(export.parent / part) if part.endswith(".png") else part for part in prompt]
            for prompt in request["prompts"]
        ]
        found = pipeline.encode_prompt(parts, negative_prompt=request["negative_prompt"])
    names = ("prompt_embeds", "negative_prompt_embeds")
    out.write_text(json.dumps({n: value.tolist() for n, value in zip(names, found, strict=True)}))


def load(way: str, export: Path, modules: str):
    """The pipeline; `modules` takes the copies that diffusers makes of a folder's own modules."""
    if way == "package":
        from megatron_kosmosg.hf.pipeline_kosmosg import KosmosGPipeline

        return KosmosGPipeline.from_pretrained(export)
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    dynamic_modules_utils.HF_MODULES_CACHE = modules
    pipeline = DiffusionPipeline.from_pretrained(export, trust_remote_code=True)
    assert type(pipeline).__module__.startswith("diffusers_modules")
    assert type(pipeline.aligner).__module__.startswith("diffusers_modules")
    return pipeline


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
