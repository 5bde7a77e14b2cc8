"""The two images of the front page, made anew.

usage, in the repository:
    python -m benchmarks.front_page grid [--output docs/prompts_and_results.png]
    python -m benchmarks.front_page curve --runs FOLDER [--output docs/learning_curve.svg]

`grid` draws the first eight held-out prompts of the toy world (seed 0, in the order of the file,
nothing left out) twice each with the trained model that comes with the package; a program reads
every result, and a red frame is around what it finds wrong. `curve` reads the metrics of
FOLDER/{pretrain,align,instruct}; docs/results.md has the commands that trained them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

REPOSITORY = Path(__file__).parents[1]
GRID = REPOSITORY / "docs" / "prompts_and_results.png"
CURVE = REPOSITORY / "docs" / "learning_curve.svg"
NUM_DRAWN, NUM_STEPS, GUIDANCE = 2, 8, 2.0
COLUMNS, CELL, GAP, FONT, TEXT_WIDTH, ARROW = 2, 80, 8, 14, 92, 32
INK, FAINT, WRONG = (31, 41, 51), (100, 116, 139), (220, 38, 38)


@dataclass(frozen=True)
class Row:
    """A prompt: its parts in order, what was drawn, and what the judging program says of each."""

    parts: list[str | Image.Image]
    drawn: list[Image.Image]
    is_right: list[bool]
    """Shape, pattern and coarse colour of every subject, and the background's word."""


def rows() -> list[Row]:
    """The first held-out prompts of the quickstart's world, drawn on the CPU in float32."""
    import torch
    from diffusers import DPMSolverMultistepScheduler

    from megatron_kosmosg.inference.model_source import find_model
    from megatron_kosmosg.inference.open_model import open_pipeline
    from megatron_kosmosg.toy import assets
    from megatron_kosmosg.toy.world import Scene
    from megatron_kosmosg.toy.world_files import NUM_PROMPTS, PROMPTS_FILE, World, write_world

    pipeline = open_pipeline(
        find_model(assets.path() / "kosmosg"), torch.float32, torch.device("cpu")
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        heldout = Path(folder) / "world" / "heldout"
        # Held-out records are keyed by seed and number, whatever the size of the world.
        write_world(heldout.parent, World(size=1, seed=0), lambda *_: None)
        prompts = _lines(heldout / PROMPTS_FILE)
        truths = _lines(heldout / "compositional.jsonl")[:NUM_PROMPTS]
        parts = [
            [
                part["text"] if "text" in part else Image.open(heldout / part["image"]).copy()
                for part in prompt["content"]
            ]
            for prompt in prompts
        ]
    found = []
    for number, (prompt, truth) in enumerate(zip(parts, truths, strict=True)):
        images = pipeline(
            prompt,
            generator=torch.Generator().manual_seed(number),
            num_images_per_prompt=NUM_DRAWN,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE,
            output_type="pt",
        ).images
        found.append(
            Row(
                prompt,
                [_image(image) for image in images],
                _comparisons(images * 2.0 - 1.0, Scene.from_json(truth["scene"])),
            )
        )
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _image(image: Any) -> Image.Image:
    levels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    return Image.fromarray(levels)


def _comparisons(images: Any, truth: Any) -> list[bool]:
    from megatron_kosmosg.toy.evaluation.scene_reader import compare, read_scenes

    seen = read_scenes(images, [len(truth.entities)] * len(images))
    comparisons = [compare(scene, truth) for scene in seen]
    return [
        all(entity.all_correct for entity in comparison.entities)
        and comparison.background_word_correct
        for comparison in comparisons
    ]


def image_of(found: Sequence[Row]) -> Image.Image:
    """Prompts in two columns, the first half on the left: the parts, an arrow, the results."""
    font = ImageFont.load_default(FONT)
    texts = [[part if _is_image(part) else _wrapped(part, font) for part in r.parts] for r in found]
    before = max(sum(_width(part, font) + GAP for part in parts) for parts in texts) + ARROW
    width = before + NUM_DRAWN * (CELL + GAP) + 3 * GAP
    height = CELL + 2 * GAP
    num_lines = -(-len(found) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, num_lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (row, parts) in enumerate(zip(found, texts, strict=True)):
        left, top = number // num_lines * width + GAP, number % num_lines * height + GAP
        x, middle = left, top + CELL / 2
        for part in parts:
            if _is_image(part):
                sheet.paste(_enlarged(part), (x, top))
            else:
                draw.text((x, middle), part, fill=INK, font=font, anchor="lm")
            x += _width(part, font) + GAP
        x = left + before
        draw.line([(x - 26, middle), (x - 12, middle)], fill=FAINT, width=2)
        draw.polygon([(x - 12, middle - 5), (x - 12, middle + 5), (x - 6, middle)], fill=FAINT)
        for image, is_right in zip(row.drawn, row.is_right, strict=True):
            sheet.paste(_enlarged(image), (x, top))
            if not is_right:
                frame = (x - 3, top - 3, x + CELL + 2, top + CELL + 2)
                draw.rectangle(frame, outline=WRONG, width=3)
            x += CELL + GAP
    return sheet


def _is_image(part: str | Image.Image) -> bool:
    return isinstance(part, Image.Image)


def _enlarged(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)


def _width(part: str | Image.Image, font: ImageFont.FreeTypeFont) -> int:
    if _is_image(part):
        return CELL
    return round(max(font.getlength(line) for line in part.splitlines()))


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > TEXT_WIDTH:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def curve_of(runs: Path) -> str:
    """SVG text: for each stage what is measured on held-out data, over its updates."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    from megatron_kosmosg.toy.report.history import read_history

    panels = (
        ("pretrain", "loss of held-out words", {"heldout_loss": "held out", "loss": "training"}),
        (
            "align",
            "cosine to the text encoder",
            {"heldout_cosine": "held out", "cosine": "training"},
        ),
        (
            "instruct",
            "share that a program reads right",
            {
                "heldout_toy_shape": "shape",
                "heldout_toy_pattern": "pattern",
                "heldout_toy_all": "all",
            },
        ),
    )
    style = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "front page"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 2.7), layout="constrained")
        for axes, (stage, title, names) in zip(figure.subplots(1, 3), panels, strict=True):
            series = read_history(runs / stage / "metrics.jsonl").series
            for name, label in names.items():
                is_faint = label == "training"
                axes.plot(
                    *series[name],
                    label=label,
                    linewidth=0.8 if is_faint else 1.8,
                    color="#94a3b8" if is_faint else None,
                    zorder=1 if is_faint else 2,
                )
            axes.set_title(f"{stage}: {title}", fontsize=9, loc="left")
            axes.set_xlabel("updates")
            axes.grid(True, color="#e2e8f0", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if stage != "pretrain":
                axes.set_ylim(0, 1.02)
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the file is written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", choices=("grid", "curve"))
    parser.add_argument("--runs", type=Path, help="folder with pretrain/, align/ and instruct/")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    if args.image == "grid":
        found = rows()
        output = args.output or GRID
        image_of(found).save(output, optimize=True)
        right = sum(sum(row.is_right) for row in found)
        print(f"{output}: {right} of {len(found) * NUM_DRAWN} results are read as right")
        return 0
    if args.runs is None:
        parser.error("curve needs --runs FOLDER")
    output = args.output or CURVE
    output.write_text(curve_of(args.runs), encoding="utf-8")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
