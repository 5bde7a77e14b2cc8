"""Exported folders in stock classes, from tokenizers of either kind; what must be installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from packaging.requirements import Requirement
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers import pipeline as transformers_pipeline

from tests.support.commands import REPOSITORY, CommandFailed
from tests.support.tiny_pipeline import prompt_image

DOG = prompt_image(1)


@pytest.fixture(scope="module")
def mllm(tmp_path_factory, commands, past) -> Path:
    """The folder of `export-mllm`."""
    folder = tmp_path_factory.mktemp("mllm") / "mllm"
    arguments = ("--input", "runs/pretrain", "--output", folder)
    commands.tool("convert_checkpoint", "export-mllm", *arguments, cwd=past).must_succeed()
    return folder


def test_the_folders_processor_takes_images(mllm):
    inputs = AutoProcessor.from_pretrained(mllm)(text="a dog", images=DOG, return_tensors="pt")
    assert "pixel_values" in inputs


def test_the_folder_works_in_transformers_pipeline(mllm):
    describe = transformers_pipeline("image-text-to-text", model=str(mllm))
    (found,) = describe(images=DOG, text="a", max_new_tokens=2)
    assert isinstance(found["generated_text"], str)


TEXTS = (
    "a red circle on a blue background",
    "A Dog's bone, 3.5 metres (about 11 feet)!",
    "  two   blanks and\ta tab ",
    "ﬁne ｆｕｌｌ-width é 中文 🙂",
)


def test_a_bpe_tokenizer_is_exported_with_equal_ids(tmp_path, commands, past):
    lines = [text for text in TEXTS for _ in range(20)]
    lines += [f"{a}{b}{c}ing the {c}{a}y" for a in "bcdfgl" for b in "aeiou" for c in "mnprst"]
    model = tmp_path / "bpe.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=320,
            minloglevel=2,
        )
    done = commands.tool(
        *("convert_checkpoint", "export-hf", "--input", "runs/instruct"),
        *("--sd", "models/stable-diffusion", "--tokenizer-model", model),
        *("--output", tmp_path / "exported"),
        cwd=past,
    )
    assert done.code == 0, done.err
    exported = PreTrainedTokenizerFast.from_pretrained(tmp_path / "exported" / "tokenizer")
    processor = sentencepiece.SentencePieceProcessor(str(model))
    for text in TEXTS:
        # fairseq's order: <unk> 3, and every piece one place further on.
        ids = [3 if piece == 0 else piece + 1 for piece in processor.encode(text)]
        assert exported(text, add_special_tokens=False).input_ids == ids, text


REQUIREMENTS = """\
import runpy, setuptools
setuptools.setup = lambda **named: print(*named["install_requires"], sep="\\n")
runpy.run_path("setup.py")
"""


@pytest.fixture(scope="module")
def required() -> dict[str, Requirement]:
    """What an installation asks for, by name."""
    done = subprocess.run(
        [sys.executable, "-c", REQUIREMENTS], cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode:
        raise CommandFailed(done.stderr)
    found = [Requirement(line) for line in done.stdout.splitlines()]
    return {requirement.name: requirement for requirement in found}


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("transformers", "5.22.0"),
        ("transformers", "4.57.6"),
        ("diffusers", "0.35.2"),
        ("diffusers", "0.36.0"),
    ],
)
def test_versions_that_gave_other_images_or_errors_are_not_asked_for(required, name, version):
    assert version not in required[name].specifier
