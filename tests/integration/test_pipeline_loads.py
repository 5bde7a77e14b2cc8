"""One folder, four ways to load it, in fresh processes without the hub; and saved again."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import fresh_loads
from tests.support.tiny_pipeline import prompt_image, tiny_pipeline

REPOSITORY = Path(__file__).parents[2]
DOG = prompt_image(1)
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """`exported/`, what the fresh processes read, and what the live pipeline gives for it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("loads")
    pipeline = tiny_pipeline(out / "parts")
    pipeline.save_pretrained(out / "exported")
    parts = ["A ", DOG, " in the snow"]
    tokens, slots = (torch.tensor([row]) for row in pipeline.prompt_tokens(parts))
    embeds, negative = pipeline.encode_prompt(parts, negative_prompt="blue")
    inputs = {
        "tokens": tokens,
        "slots": slots,
        "pixel_values": pipeline._pixels([parts], torch.device("cpu")),
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "picture": torch.from_numpy(np.array(DOG)),
    }
    with torch.no_grad():
        output = pipeline.mllm(
            pixel_values=inputs["pixel_values"],
            input_ids=tokens,
            image_embeds_position_mask=slots,
            output_hidden_states=True,
        )
    expected = {
        "images": fresh_loads.draw(pipeline, inputs),
        "logits": output.logits,
        "hidden": output.hidden_states[-1],
    }
    save_file({k: v.contiguous() for k, v in inputs.items()}, out / "inputs.safetensors")
    save_file(expected, out / "expected.safetensors")
    return out


def load(way: str, out: Path, package: bool = False) -> dict[str, torch.Tensor]:
    """What a fresh process gets; the package is importable only if `package`."""
    overlay = [os.environ["KOSMOSG_OVERLAY"]] if "KOSMOSG_OVERLAY" in os.environ else []
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(out / f"modules-{way}"),
        "HF_HOME": str(out / "empty-hub-cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY)] * package + overlay),
    }
    command = [sys.executable, fresh_loads.__file__, way, str(out / "exported"), str(out)]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / f"{way}.safetensors")


def compare(found: dict, out: Path) -> None:
    expected = load_file(out / "expected.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name.removesuffix("_saved_again")], msg=name, **CLOSE
        )


def test_without_the_package(out) -> None:
    """Remote code needs consent; what such a pipeline saves is the same folder again."""
    found = load("with_remote_code", out)
    assert set(found) == {"images", "images_saved_again"}
    compare(found, out)
    assert "trust_remote_code=True" in (out / "refusal.txt").read_text()
    assert_same_files(out / "exported", out / "saved-again")


def test_with_the_package(out) -> None:
    compare(load("with_package", out, package=True), out)
    assert_same_files(out / "exported", out / "saved-by-package")


def test_the_language_model_and_stable_diffusion_each_with_stock_classes(out) -> None:
    """One process for the two: importing the libraries again would prove nothing more."""
    found = load("stock_classes", out)
    assert set(found) == {"logits", "hidden", "images"}
    compare(found, out)


def test_the_folder_is_portable(out) -> None:
    """Nothing in it names this installation, or a class that only one set-up knows."""
    folder = out / "exported"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_kosmosg", "KosmosGPipeline"]
    assert index["aligner"] == ["modeling_kosmosg_aligner", "KosmosGAligner"]
    assert index["mllm"] == ["transformers", "Kosmos2ForConditionalGeneration"]
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert index["mllm_image_processor"] == ["transformers", "CLIPImageProcessor"]
    assert index["text_encoder"] == [None, None]
    for code in folder.rglob("*.py"):
        lines = code.read_text().splitlines()
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        assert imports and not [line for line in imports if "megatron_kosmosg" in line]


def assert_same_files(first: Path, second: Path) -> None:
    """Equal names and bytes, except for what models note about where they came from."""
    names, others = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    )
    assert names == others
    _, different, unread = filecmp.cmpfiles(first, second, sorted(names), shallow=False)
    assert not unread
    for name in different:
        assert name.endswith("/config.json")
        assert settings(first / name) == settings(second / name)


def settings(path: Path) -> dict:
    """A model's config without the folder and the dtype it was loaded from."""
    return json.loads(
        path.read_text(),
        object_hook=lambda d: {k: v for k, v in d.items() if k not in ("_name_or_path", "dtype")},
    )
