"""No command writes over what it reads: refused before anything is written, the input intact."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_kosmosg import exit_codes, train
from megatron_kosmosg.cli.main import main
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import is_saved_config, load_config, to_yaml
from megatron_kosmosg.config.overwrites import refuse_to_overwrite, refuse_to_run_over_inputs
from megatron_kosmosg.config.schema import BlendEntry, DataConfig, RunConfig
from megatron_kosmosg.conversion.exported_folder import new_output_folder
from megatron_kosmosg.data.dataset_files import dataset_files, files_read
from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.normalise import target_pixels
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.inference.generate import Job, generate
from megatron_kosmosg.inference.image_plan import ImagePlan, RunSettings
from megatron_kosmosg.inference.prompt_records import GenerationOptions, PromptRecord
from megatron_kosmosg.preprocess.input_files import find_inputs
from megatron_kosmosg.preprocess.latent_moments import LatentJob, cache_latents
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
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


def refused_command(arguments: list[str], capsys) -> str:
    """What `kosmosg ARGUMENTS` says when it refuses, which is one line."""
    assert main(arguments) == exit_codes.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    return line


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


def test_a_glob_takes_no_product_of_any_run_and_a_name_does(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [*text_records(3), {"text": ""}])
    rejects = write_jsonl(tmp_path / "own.rejects.jsonl", text_records(2))
    model = str(write_tokenizer(tmp_path / "model"))
    for name in ("all", "other"):
        job = PreprocessJob("text", (str(corpus),), model, str(tmp_path / name))
        preprocess(job, lambda *_: None)
    (tmp_path / ".killed.partial").mkdir()
    (tmp_path / ".killed.partial" / "lock").touch()
    write_jsonl(tmp_path / ".killed.partial" / "00000000.rejects.jsonl", text_records(1))

    def found(pattern: str) -> list[str]:
        return [
            source.path.name for source in find_inputs([str(tmp_path / pattern)], KINDS["text"])
        ]

    assert found("*.jsonl") == ["a.jsonl", "own.rejects.jsonl"]
    assert found("[!m]*") == found("*.jsonl")
    assert found("all.rejects.jsonl") == ["all.rejects.jsonl"]
    assert found("own.r*") == [rejects.name]
    for pattern in ("*.rejects.json*", ".killed.partial/*.jsonl", "al*.json"):
        if pattern.startswith("*"):
            rejects.unlink()
        with pytest.raises(ValueError, match="matches no file but .*, which preprocessing wrote"):
            found(pattern)


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


def test_a_image_does_not_replace_one_that_a_prompt_shows(tmp_path):
    shown = tmp_path / "dog-0.png"
    shown.write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8)))
    defaults = GenerationOptions(negative_prompt="", seed=7, num_images=1, steps=4, guidance=2.0)
    plan = ImagePlan(RunSettings("model", "saved", "fp32", defaults))
    record = PromptRecord("dog", ("a", shown), GenerationOptions())

    class ImageGenerator:
        def check(self, images):
            pass

        def generate(self, images):
            return [Image.new("RGB", (8, 8)) for _ in images]

    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="give another --output"):
        generate(Job([record], plan, tmp_path, "sheet.png"), ImageGenerator, lambda *_: None)
    assert contents(tmp_path) == before
    assert (
        generate(Job([record], plan, tmp_path / "new", "s.png"), ImageGenerator, lambda *_: None)
        == 1
    )


@pytest.mark.parametrize("option", ["--json", "--svg"])
@pytest.mark.parametrize("output", ["run.yaml", "link.yaml", "base.yaml", "data.json", "sd/new"])
def test_a_plan_does_not_replace_what_it_is_made_from(tmp_path, capsys, option, output):
    (tmp_path / "base.yaml").write_text("include: toy_instruct\n")
    config = tmp_path / "run.yaml"
    config.write_text("include: base.yaml\n")
    (tmp_path / "link.yaml").symlink_to(config)
    (tmp_path / "sd").mkdir()
    (tmp_path / "data.json").write_text("{}")
    command = ["plan", "--config", str(config), "--gpu", "h100-80", option, str(tmp_path / output)]
    places = [f"data.blend.edit.path={tmp_path / 'data'}", f"model.diffusion.path={tmp_path}/sd"]
    before = contents(tmp_path)
    message = refused_command([*command, "--num-gpus", "1", *places], capsys)
    assert f"which is read; give another {option}" in message
    assert contents(tmp_path) == before


def test_a_run_does_not_replace_the_config_that_was_written_for_it(tmp_path, capsys):
    config = tmp_path / "run" / "config.yaml"
    config.parent.mkdir()
    text = f"include: toy_pretrain\nlogging: {{output_dir: {config.parent}}}\n"
    config.write_text(text)
    message = refused_command(["train", "--config", str(config)], capsys)
    assert f"{config} would be written over {config}" in message
    assert config.read_text() == text
    config.write_text(to_yaml(load_config(config, [])))
    assert is_saved_config(config)  # the run may be started again with what it left


def run_of(folder: Path, output: str, **more: str | None) -> RunConfig:
    """A `pretrain` run in `output` on the dataset data/text."""
    dataset = folder / "data" / "text"
    config = RunConfig(stage="pretrain", data=DataConfig(blend={"t": BlendEntry(str(dataset))}))
    return dataclasses.replace(
        config,
        logging=dataclasses.replace(config.logging, output_dir=str(folder / output)),
        checkpoint=dataclasses.replace(config.checkpoint, **more),
    )


def test_a_run_writes_into_nothing_that_it_reads(tmp_path):
    for name in ("before/checkpoints/iter_0000004", "sd/unet", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "text.bin").touch()
    (tmp_path / "linked").symlink_to(tmp_path / "before")

    def check(output: str, load: str | None = None, save: str | None = None) -> None:
        folders = {"load": load and str(tmp_path / load), "save": save and str(tmp_path / save)}
        config = run_of(tmp_path, output, **folders)
        refuse_to_run_over_inputs(config, files_read(config), [tmp_path / "sd"])

    check("before/new", load="before")
    check("new", load="before/checkpoints/iter_0000004")
    check("data/new")
    for output in ("sd", "sd/new", "sd/unet"):
        with pytest.raises(ConfigError, match="give another logging.output_dir"):
            check(output)
    for output in ("before", "linked", "before/checkpoints", "before/checkpoints/iter_0000004/x"):
        with pytest.raises(ConfigError, match="give another logging.output_dir"):
            check(output, load="before")
    for save in ("before/checkpoints", "linked/checkpoints"):
        for load in ("before", "before/checkpoints", "before/checkpoints/iter_0000004"):
            with pytest.raises(ConfigError, match="give another checkpoint.save"):
                check("new", load=load, save=save)


@pytest.mark.parametrize("name", ["trace", "packing/text"])
def test_a_run_does_not_replace_its_dataset(tmp_path, name):
    prefix = build_dataset(tmp_path, "caption", 2)
    moved = tmp_path / "run" / name
    moved.parent.mkdir(parents=True)
    for file in filter(Path.exists, dataset_files(prefix)):
        file.rename(f"{moved}{str(file).removeprefix(prefix)}")
    data = DataConfig(
        blend={"caption": BlendEntry(str(moved))}, tokenizer_model=str(write_tokenizer(tmp_path))
    )
    config = dataclasses.replace(run_of(tmp_path, "run"), data=data)
    with pytest.raises(ConfigError, match="written over .*give another logging.output_dir"):
        train.check_inputs(config)


@pytest.mark.parametrize(
    ("output", "captions"),
    [("pictures", "input"), ("pictures/built", "input"), ("out", "out/report.json")],
)
def test_building_data_replaces_no_image_and_no_annotation(tmp_path, capsys, output, captions):
    for name in ("pictures/contact_sheet.png", "out/report.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8)))
    before = contents(tmp_path)
    source = "input" if captions == "input" else str(tmp_path / captions)
    command = ["build-data", "--input", str(tmp_path / "pictures"), "--captions", source]
    message = refused_command([*command, "--output", str(tmp_path / output)], capsys)
    assert "which is read; give another --output" in message
    assert contents(tmp_path) == before


def test_a_report_does_not_replace_a_image_that_it_shows(tmp_path, capsys):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "report.html").write_text("a picture")
    listed = [{"file": "../report.html", "title": "", "caption": ""}]
    (tmp_path / "evaluation" / "images.json").write_text(json.dumps(listed))
    (tmp_path / "evaluation" / "metrics.json").write_text('{"rows": [{"group": "g", "name": "n"}]}')
    before = contents(tmp_path)
    message = refused_command(["toy", "make-report", "--output", str(tmp_path)], capsys)
    assert "report.html lies outside" in message
    assert contents(tmp_path) == before


def test_an_evaluation_is_not_written_into_a_checkpoint(tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text('{"files": {}}')
    (checkpoint / "config.yaml").write_text(to_yaml(load_config("toy_instruct", [])))
    command = ["evaluate", "toy", "--run", f"instruct={tmp_path / 'run'}"]
    message = refused_command([*command, "--output", str(checkpoint / "new")], capsys)
    assert f"would be written into {checkpoint}" in message


def test_toy_assets_are_not_written_into_their_working_folder(tmp_path, capsys):
    command = ["toy", "train-assets", "export", "--run", str(tmp_path), "--assets", str(tmp_path)]
    assert "give another --assets" in refused_command(command, capsys)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_a_latent_cache_does_not_replace_a_dataset_of_another_tool(tmp_path, end):
    prefix = build_dataset(tmp_path, "caption", 2)
    other = Path(f"{prefix}.latents{end}")
    other.write_bytes(b"tokens")
    with pytest.raises(ConfigError, match="belongs to no cache of latents; give another --name"):
        cache(prefix)
    assert other.read_bytes() == b"tokens"
    other.unlink()
    Path(f"{prefix}.latents.partial.bin").symlink_to(f"{prefix}.bin")
    with pytest.raises(ConfigError, match="written over .*give another --name"):
        cache(prefix)


def cache(prefix: str) -> None:
    """Comes to the checks of names alone: there is no VAE."""
    job = LatentJob(SampleStore(prefix), "latents", target_pixels(8), "fp32")
    cache_latents(job, None, "mark", None, 0, 1, lambda *_: None)


def test_a_temporary_folder_is_not_made_in_place_of_a_model(tmp_path):
    model = tmp_path / "export.tmp"
    model.mkdir()
    (model / "weights").write_text("weights")
    with (
        pytest.raises(ConfigError, match="written over"),
        new_output_folder(tmp_path / "export", [model]),
    ):
        pass
    assert contents(tmp_path) == {"export.tmp/weights": b"weights"}
    (model / "sub").mkdir()
    with pytest.raises(ConfigError, match="written over"):
        with new_output_folder(tmp_path / "export", [model / "sub"]):
            pass


def test_an_output_may_lie_within_a_folder_that_is_read(tmp_path):
    refuse_to_overwrite([tmp_path / "run" / "export"], [tmp_path / "run"], "--output")
    (tmp_path / "run" / "export").mkdir(parents=True)
    refuse_to_overwrite([tmp_path / "run" / "export"], [tmp_path / "run"], "--output")
