"""README.md of an exported folder: which versions read it rightly, and how it is opened.

The folder travels without this package, so it says itself what its readers must know.
"""

from __future__ import annotations

from pathlib import Path

TESTED = {
    "transformers": ("5.23.0", "5.23.0"),
    "diffusers": ("0.38.0", "0.42.1"),
    "accelerate": ("1.1.0", "1.15.0"),
    "pillow": ("12.0.0", "12.3.0"),
}
"""Oldest and newest version that the tests ran with; setup.py and constraints.txt have the same."""
FILE = "README.md"

_CARD = """\
---
library_name: {library}
pipeline_tag: {task}
tags:
- kosmos-g
- megatron_kosmosg
---

# {title}

{opening}

| package | oldest tested | newest tested |
|---|---|---|
{versions}

Stock Kosmos-2 of transformers before 5.23 hides patches of an image from the language model: other
conditions and other words, without an error. There, set this after loading the model:

```python
model.image_to_text_projection.x_attn.is_causal = False
```

`KosmosGPipeline` does so itself, and refuses to load where it does not help.
"""

_PIPELINE = """\
`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` runs the two .py files of this
folder; with the package `megatron_kosmosg`, `KosmosGPipeline.from_pretrained(FOLDER)` runs none of
them. The language model alone is stock:
`AutoModelForImageTextToText.from_pretrained(FOLDER, subfolder="mllm")`."""

_MLLM = """\
A stock Kosmos-2: `pipeline("image-text-to-text", model=FOLDER)`, or `AutoProcessor` and
`AutoModelForImageTextToText`. The processor puts one image in front of the text; names of its tags
for places (`<grounding>`, `<phrase>` ...) are no tokens of this model and must not be in it."""


def write_model_card(folder: Path, *, is_pipeline: bool) -> None:
    """README.md of a folder of export-hf (a pipeline) or export-mllm."""
    rows = (f"| {name} | {oldest} | {newest} |" for name, (oldest, newest) in TESTED.items())
    card = _CARD.format(
        library="diffusers" if is_pipeline else "transformers",
        task="text-to-image" if is_pipeline else "image-text-to-text",
        title="KOSMOS-G" if is_pipeline else "The language model of KOSMOS-G",
        opening=_PIPELINE if is_pipeline else _MLLM,
        versions="\n".join(rows),
    )
    (folder / FILE).write_text(card, encoding="utf-8")
