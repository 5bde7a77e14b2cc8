"""Images as a model is shown them, read from the page that tools/inspect_data.py writes."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.commands import CommandFailed, Commands
from tests.support.public import SampleStore

PROMPT_SIZE, TARGET_SIZE = 56, 64
"""Pixels a side of images in prompts and of targets."""

CONFIG = """\
stage: instruct
model:
  vision: {{image_size: {prompt}, patch_size: 14}}
  resampler: {{num_latent_queries: 4}}
data:
  image_backend: {backend}
  target_image_size: {target}
  seq_length: 48
  background_keep_prob: 0.0
  entity_text_drop_prob: 0.0
  caption_drop_prob: 0.0
logging: {{output_dir: unused}}
"""
"""Backgrounds are painted over and no words dropped, whatever the seed; rows of pretrain are short,
as the page decodes them too."""


@dataclass(frozen=True)
class Shown:
    """One sample of the page; images are uint8 [height, width, 3]."""

    num_bad: int
    """Images that could not be decoded; then the prompt is another sample's."""
    prompt: list[np.ndarray]
    target: np.ndarray
    stored: list[np.ndarray]
    """Small, as stored: no resizing to the model's size, no painting over."""


def model_view(commands: Commands, prefix: Path, model: Path, backend: str) -> dict[str, Shown]:
    """{key: what `instruct` is shown} of all samples of a dataset, decoded by `backend`.

    model: SentencePiece model file.
    """
    config = prefix.with_name(f"{prefix.name}.{backend}.yaml")
    config.write_text(CONFIG.format(prompt=PROMPT_SIZE, target=TARGET_SIZE, backend=backend))
    page = prefix.with_name(f"{prefix.name}.{backend}.html")
    commands.tool(
        "inspect_data",
        *(prefix, "--config", config, "--tokenizer-model", model, "--output", page),
        *("--samples", len(SampleStore(prefix))),  # one epoch: each of them once
    ).must_succeed()
    section = page.read_text(encoding="utf-8").partition("As instruct sees it")[2]
    return dict(map(_shown, section.split("<article>")[1:]))


def model_views(commands: Commands, prefix: Path, model: Path) -> dict[str, dict[str, Shown]]:
    """{backend: its `model_view`}."""
    return {name: model_view(commands, prefix, model, name) for name in ("pillow", "dali")}


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over pixels and channels, in levels of 255."""
    return float(np.abs(first.astype(int) - second).mean())


def _shown(card: str) -> tuple[str, Shown]:
    header, _, rest = card.partition("</header>")
    key = re.search(r"sample ([^<,]+)", header)
    bad = re.search(r"(\d+) bad", header)
    prompt, _, rest = rest.partition('<figure class="target">')
    target, _, stored = rest.partition("</figure>")
    if key is None:
        raise CommandFailed(f"inspect_data.py's page has another form: {header}")
    shown = Shown(int(bad[1]) if bad else 0, _images(prompt), _images(target)[0], _images(stored))
    return key[1], shown


def _images(html: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/\w+;base64,([^\"]+)", html)
    return [np.asarray(_opened(base64.b64decode(data))) for data in found]


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
