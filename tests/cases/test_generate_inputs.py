"""tools/generate.py with arguments and files that its users gave it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support.commands import Commands, Ran


def generate(commands: Commands, exported: Path, output: Path, *more: object) -> Ran:
    """`generate.py` with one step; the prompt is "a red circle" unless more says otherwise."""
    has_prompt = "--prompts" in more or "--prompt" in more
    prompt = () if has_prompt else ("--prompt", "a red circle")
    common = ("--model", exported, "--output", output, "--steps", 1, "--sheet-rows", 0)
    return commands.tool("generate", *common, *prompt, *more)


@pytest.mark.parametrize("side", ["height", "width"])
def test_one_side_alone_is_drawn(commands, exported, tmp_path, side):
    generate(commands, exported, tmp_path / "own").must_succeed()
    generate(commands, exported, tmp_path / "out", f"--{side}", 32).must_succeed()
    (reference,), (path,) = ((tmp_path / name).glob("*.png") for name in ("own", "out"))
    with Image.open(reference) as model, Image.open(path) as image:
        expected = {"height": model.height, "width": model.width, side: 32}
        assert {"height": image.height, "width": image.width} == expected
        assert json.loads(image.text["settings"])[side] == 32


@pytest.mark.parametrize(
    "arguments",
    [
        ("--seed", 1 << 64),
        ("--lora", "flux.safetensors"),
    ],
    ids=["seed", "lora"],
)
def test_what_cannot_be_used_is_one_line(commands, exported, tmp_path, arguments):
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    sizes = {f"{layer}.lora_A.weight": (2, 8), f"{layer}.lora_B.weight": (8, 2)}
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    save_file(tensors, tmp_path / "flux.safetensors")
    command = [tmp_path / a if str(a).endswith(".safetensors") else a for a in arguments]
    done = generate(commands, exported, tmp_path / "out", *command)
    assert "Traceback" not in done.err and done.code == 2
    assert sum(line.startswith("error: ") for line in done.err.splitlines()) == 1


def test_a_line_separator_inside_a_prompt_is_a_character(commands, exported, tmp_path):
    record = json.dumps({"id": "a", "prompt": "a red\u2028circle"}, ensure_ascii=False)
    (tmp_path / "prompts.jsonl").write_text(record + "\n", encoding="utf-8")
    done = generate(commands, exported, tmp_path / "out", "--prompts", tmp_path / "prompts.jsonl")
    assert done.code == 0, done.err


def test_cut_outs_that_look_the_same_draw_the_same(commands, exported, tmp_path):
    drawn = []
    for level in (0, 255):
        image = Image.new("RGBA", (40, 40), (level, level, level, 0))
        image.paste(Image.new("RGBA", (20, 20), (200, 30, 30, 255)), (10, 10))
        image.save(tmp_path / f"{level}.png")
        output = tmp_path / f"out-{level}"
        prompt = ("--prompt", "<image>", "--image", tmp_path / f"{level}.png")
        generate(commands, exported, output, *prompt).must_succeed()
        (path,) = output.glob("*.png")
        drawn.append(Image.open(path).tobytes())
    assert drawn[0] == drawn[1]
