"""Pipelines that are changed, saved and loaded, with what diffusers puts around their parts."""

from __future__ import annotations

import copy
import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from tests.support.public import KosmosGPipeline
from tests.support.tiny_pipeline import prompt_image

DOG = prompt_image(1)
PROMPT = ["A", DOG, "in snow"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shared(exported) -> KosmosGPipeline:
    """As it was saved; nothing changes it."""
    return KosmosGPipeline.from_pretrained(exported)


@pytest.fixture
def pipeline(shared) -> KosmosGPipeline:
    """One with an aligner of its own."""
    return KosmosGPipeline(**{**shared.components, "aligner": copy.deepcopy(shared.aligner)})


def condition(pipeline, prompt: str | list = PROMPT) -> torch.Tensor:
    return pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0]


def assert_same_condition(pipeline, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(condition(pipeline), expected, rtol=0, atol=atol)


def test_sequential_offload_of_the_aligner_changes_nothing(shared, pipeline):
    expected = condition(shared)
    cpu_offload(pipeline.aligner, CPU)
    assert_same_condition(pipeline, expected)


def test_layerwise_casting_of_the_aligner_changes_little(pipeline):
    pipeline = copy.deepcopy(pipeline).to(torch.bfloat16)
    expected = condition(pipeline)
    pipeline.aligner.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
    )
    assert_same_condition(pipeline, expected, atol=0.2 * float(expected.abs().max()))


def test_group_offload_of_the_aligner_to_disk_changes_nothing(shared, pipeline, tmp_path):
    expected = condition(shared)
    pipeline.aligner.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
    )
    assert_same_condition(pipeline, expected)


def test_added_tokens_are_saved(exported, tmp_path):
    pipeline = KosmosGPipeline.from_pretrained(exported)
    pipeline.tokenizer.add_tokens(["<mydog>"])
    pipeline.mllm.resize_token_embeddings(len(pipeline.tokenizer))
    expected = condition(pipeline, "a <mydog> here")
    pipeline.save_pretrained(tmp_path / "saved")
    again = KosmosGPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(condition(again, "a <mydog> here"), expected, rtol=0, atol=1e-5)


def test_a_compiled_aligner_is_saved_as_the_aligner(shared, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipeline.aligner = torch.compile(pipeline.aligner, backend="eager")
    pipeline.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert_same_condition(again, condition(shared))


def test_from_pipe_takes_a_pipeline_of_its_own_kind(shared):
    again = KosmosGPipeline.from_pipe(shared)
    assert isinstance(again, KosmosGPipeline)
    assert_same_condition(again, condition(shared))


@pytest.mark.parametrize("left_out", [("mllm", "aligner"), ("mllm", "aligner", "tokenizer")])
def test_a_pipeline_without_its_language_side_is_saved_and_loaded(shared, tmp_path, left_out):
    light = KosmosGPipeline(**{**shared.components, **dict.fromkeys(left_out)})
    light.save_pretrained(tmp_path / "light")
    again = KosmosGPipeline.from_pretrained(tmp_path / "light")
    assert all(getattr(again, name) is None for name in left_out)


def test_the_call_shows_stable_diffusions_arguments():
    shown = inspect.signature(KosmosGPipeline.__call__).parameters
    needed = ("height", "width", "num_inference_steps", "generator", "callback_on_step_end")
    assert [name for name in needed if name not in shown] == []


def test_a_folder_loaded_by_a_relative_name_is_saved_complete(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(exported.parent)
    pipeline = KosmosGPipeline.from_pretrained(exported.name)
    monkeypatch.chdir("/")
    pipeline.save_pretrained(tmp_path / "saved")
    assert names_in(exported) - names_in(tmp_path / "saved") == set()


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_import_without_the_tokenizers_model_advises_what_there_is(commands, past, tmp_path):
    shutil.copytree(past / "export", tmp_path / "export")
    (tmp_path / "export" / "tokenizer" / "sentencepiece.bpe.model").unlink()
    done = commands.tool(
        *("convert_checkpoint", "import-hf", "--input", tmp_path / "export"),
        *("--output", tmp_path / "run"),
    )
    known = commands.tool("convert_checkpoint", "import-hf", "--help").must_succeed().out
    advised = re.findall(r"--[a-z][a-z-]+", done.text)
    assert done.code == 0 or [option for option in advised if option not in known] == []
