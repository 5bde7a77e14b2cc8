"""No command writes over what it reads: refused before anything is written, the input intact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.overwrites import refuse_to_overwrite
from megatron_kosmosg.conversion.output_folder import new_folder
from megatron_kosmosg.inference.generate import Job, generate
from megatron_kosmosg.inference.picture_plan import PicturePlan, RunSettings
from megatron_kosmosg.inference.prompt_records import DrawingOptions, PromptRecord
from megatron_kosmosg.preprocess.run import PreprocessJob, preprocess
from tests.support.data_helpers import (
    build_dataset,
    encode_image,
    text_records,
    write_jsonl,
    write_tokenizer,
)

REPOSITORY = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(folder: Path, source: Path, prefix: Path, pattern: str | None = None) -> None:
    """Preprocessing `source` to `prefix` is refused, and `folder` stays as it is."""
    model, before = write_tokenizer(folder), contents(folder)
    job = PreprocessJob("text", (pattern or str(source),), str(model), str(prefix))
    with pytest.raises(ConfigError, match="which is read; give another --output-prefix"):
        preprocess(job, lambda *_: None)
    assert contents(folder) == before


def test_the_tool_does_not_replace_a_corpus_by_its_manifest(tmp_path):
    source = write_jsonl(tmp_path / "my-corpus.json", text_records(3))
    model, before = write_tokenizer(tmp_path), contents(tmp_path)
    command = [sys.executable, "tools/preprocess_data.py", "--kind", "text"]
    command += ["--input", str(source), "--tokenizer-model", str(model)]
    command += ["--output-prefix", str(source.with_suffix(""))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{source} would be written over {source}" in done.stderr
    assert contents(tmp_path) == {**before}


@pytest.mark.parametrize("end", [".json", ".rejects.jsonl"])
def test_every_file_of_a_run_is_compared(tmp_path, end):
    refused(tmp_path, write_jsonl(tmp_path / f"a{end}", text_records(3)), tmp_path / "a")


def test_a_corpus_behind_a_link_is_recognised_in_both_directions(tmp_path):
    source = write_jsonl(tmp_path / "real" / "corpus.json", text_records(3))
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "other.json").symlink_to(source)
    refused(tmp_path, tmp_path / "linked" / "corpus.json", tmp_path / "real" / "corpus")
    refused(tmp_path, source, tmp_path / "linked" / "corpus")
    refused(tmp_path, source, tmp_path / "other")


def test_names_are_compared_as_the_file_system_does(tmp_path):
    source = write_jsonl(tmp_path / "Corpus.json", text_records(3))
    if (tmp_path / "corpus.json").exists():
        refused(tmp_path, source, tmp_path / "corpus")
    else:
        job = PreprocessJob("text", (str(source),), str(write_tokenizer(tmp_path)),
                            str(tmp_path / "corpus"))  # fmt: skip
        preprocess(job, lambda *_: None)
        assert len(source.read_text().splitlines()) == 3


def test_a_corpus_of_a_glob_a_tokenizer_and_a_corpus_in_the_work_folder(tmp_path):
    source = write_jsonl(tmp_path / "b.json", text_records(3))
    refused(tmp_path, source, tmp_path / "b", pattern=str(tmp_path / "*.json"))
    inside = write_jsonl(tmp_path / ".c.partial" / "corpus.jsonl", text_records(3))
    refused(tmp_path, inside, tmp_path / "c")
    model = write_tokenizer(tmp_path).rename(tmp_path / "d.json")
    job = PreprocessJob("text", (str(source),), str(model), str(tmp_path / "d"))
    with pytest.raises(ConfigError, match="written over"):
        preprocess(job, lambda *_: None)


def test_the_listing_of_a_folder_of_prompts(tmp_path):
    root = tmp_path / "pix2pix"
    (root / "0").mkdir(parents=True)
    (root / "seeds.json").write_text('[["0", ["1"]]]')
    (root / "0" / "prompt.json").write_text("{}")
    for prefix in (root / "seeds", root / "0" / "prompt"):
        before = contents(root)
        job = PreprocessJob("edit", (str(root),), str(write_tokenizer(tmp_path)), str(prefix))
        with pytest.raises(ConfigError, match="written over"):
            preprocess(job, lambda *_: None)
        assert contents(root) == before


def test_other_outputs_of_an_earlier_run_are_replaced_as_before(tmp_path):
    source = write_jsonl(tmp_path / "e.jsonl", text_records(3))
    job = PreprocessJob("text", (str(source),), str(write_tokenizer(tmp_path)), str(tmp_path / "e"))
    for _ in range(2):
        preprocess(job, lambda *_: None)
    assert json.loads((tmp_path / "e.json").read_text())["kind"] == "text"


def test_a_page_does_not_replace_its_dataset(tmp_path):
    prefix = build_dataset(tmp_path, "caption", 2)
    before = contents(tmp_path)
    command = [sys.executable, "tools/inspect_data.py", str(prefix), "--output", f"{prefix}.json"]
    command += ["--tokenizer-model", str(write_tokenizer(tmp_path))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "written over" in done.stderr.splitlines()[-1]
    assert contents(tmp_path) == before


def test_a_picture_does_not_replace_one_that_a_prompt_shows(tmp_path):
    shown = tmp_path / "dog-0.png"
    shown.write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8)))
    defaults = DrawingOptions(negative_prompt="", seed=7, num_images=1, steps=4, guidance=2.0)
    plan = PicturePlan(RunSettings("model", "saved", "fp32", defaults))
    record = PromptRecord("dog", ("a", shown), DrawingOptions())

    class Drawer:
        def check(self, pictures):
            pass

        def draw(self, pictures):
            return [Image.new("RGB", (8, 8)) for _ in pictures]

    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="give another --output"):
        generate(Job([record], plan, tmp_path, "sheet.png"), Drawer, lambda *_: None)
    assert contents(tmp_path) == before
    assert generate(Job([record], plan, tmp_path / "new", "s.png"), Drawer, lambda *_: None) == 1


def test_a_temporary_folder_is_not_made_in_place_of_a_model(tmp_path):
    model = tmp_path / "export.tmp"
    model.mkdir()
    (model / "weights").write_text("weights")
    with pytest.raises(ConfigError, match="written over"), new_folder(tmp_path / "export", [model]):
        pass
    assert contents(tmp_path) == {"export.tmp/weights": b"weights"}
    (model / "sub").mkdir()
    with pytest.raises(ConfigError, match="written over"):
        with new_folder(tmp_path / "export", [model / "sub"]):
            pass


def test_an_output_may_lie_within_a_folder_that_is_read(tmp_path):
    refuse_to_overwrite([tmp_path / "run" / "export"], [tmp_path / "run"], "--output")
    (tmp_path / "run" / "export").mkdir(parents=True)
    refuse_to_overwrite([tmp_path / "run" / "export"], [tmp_path / "run"], "--output")
