"""A model folder of somebody else opens as weights and settings: none of its files runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.config.untrusted_folders import check_pipeline_folder
from megatron_kosmosg.conversion.exported_models import load_mllm
from megatron_kosmosg.inference.model_source import find_model
from megatron_kosmosg.inference.open_model import open_generator, open_pipeline


@pytest.fixture
def folder(past, tmp_path) -> Path:
    """An exported folder that may be changed."""
    return Path(shutil.copytree(past / "export", tmp_path / "export"))


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "code-ran"


def program(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()\nclass UNet2DConditionModel: pass\n"


def rewrite(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def open_it(folder: Path) -> None:
    open_generator(find_model(folder), "ddim", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("unet", ["planted", "UNet2DConditionModel"]),
        ("unet", ["diffusers", "DiffusionPipeline"]),
        ("scheduler", ["antigravity", "DDIMScheduler"]),
        ("tokenizer", ["transformers", "pipeline"]),
        ("extra", ["planted", "Anything"]),
        ("vae", ["diffusers"]),
    ],
)
def test_an_index_names_known_classes_alone(folder, mark, part, entry):
    (folder / part).mkdir(exist_ok=True)
    (folder / part / "planted.py").write_text(program(mark))
    rewrite(folder / "model_index.json", **{part: entry})
    with pytest.raises(ConfigError, match=f"for the part '{part}'"):
        open_it(folder)
    assert not mark.exists()


def test_a_file_that_would_take_a_librarys_place_is_refused(folder, mark):
    (folder / "unet" / "diffusers.py").write_text(program(mark))
    with pytest.raises(ConfigError, match=r"unet/diffusers\.py would run"):
        open_it(folder)
    assert not mark.exists()


def test_the_folders_own_python_files_do_not_run(folder, mark):
    for name in ("pipeline_kosmosg.py", "aligner/modeling_kosmosg_aligner.py"):
        (folder / name).write_text(program(mark))
    pipeline = open_pipeline(find_model(folder), torch.float32, torch.device("cpu"))
    assert not mark.exists() and type(pipeline).__module__.startswith("megatron_kosmosg.")


@pytest.mark.parametrize(
    "asks",
    [
        {"attn_implementation": "somebody/kernels"},
        {"_attn_implementation": "somebody/kernels@main:attention"},
        {"text_config": {"_attn_implementation": "somebody/kernels"}},
        {"attn_implementation": {"text_config": "somebody/kernels"}},
    ],
)
def test_a_config_does_not_choose_a_kernel_from_elsewhere(folder, asks):
    rewrite(folder / "mllm" / "config.json", **asks)
    for load in (check_pipeline_folder, lambda path: load_mllm(path / "mllm", torch.float32)):
        with pytest.raises(ConversionError, match="somebody/kernels"):
            load(folder)


def test_what_export_hf_writes_is_accepted(folder):
    check_pipeline_folder(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", "\x00"])
def test_an_index_that_is_none_is_one_message(folder, content):
    (folder / "model_index.json").write_text(content)
    with pytest.raises(ConversionError, match=r"model_index\.json"):
        check_pipeline_folder(folder)
