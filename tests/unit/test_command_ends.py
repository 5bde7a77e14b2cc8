"""How commands end where the machine refuses: a disk, memory, permissions, a reader that left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from megatron_kosmosg import command_line, exit_codes
from megatron_kosmosg.cli import build_instruct_data, cache_latents, generate, inspect_data
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.inference import generation_run
from megatron_kosmosg.inference.pipeline_generator import PipelineGenerator
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.cli import make_report
from tests.support.data_helpers import build_dataset, write_tokenizer
from tests.support.tiny_models import write_stable_diffusion

MODEL = ["--model", str(assets.path() / "kosmosg")]
NOBODY = 65534


def error_of(capsys) -> str:
    """The one error that was said."""
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_answer_that_cannot_be_written_is_an_error(unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_kosmosg", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
    (error,) = done.stderr.splitlines()
    assert done.returncode == exit_codes.BAD_INPUT
    assert error.startswith("error: ") and "No space left on device" in error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "full"), 2),
        (OSError(errno.EROFS, "read-only"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
        (OSError(errno.EIO, "Input/output error", "x"), 1),
    ],
)
def test_generate_fails_with_1_only_where_it_may_succeed_later(error, code, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(generation_run, "run", fail)
    assert generate.main([*MODEL, "--prompt", "a", "--output", "o"]) == code
    said = capsys.readouterr().err
    assert ("the same command continues" in said) == (code == 1)


def test_memory_that_does_not_suffice_is_one_error(capsys):
    def work() -> int:
        torch.empty(2**55)
        return 0

    assert command_line.run_command(work) == exit_codes.BAD_INPUT
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: the memory does not suffice (") and "allocate memory" in error
    with pytest.raises(RuntimeError, match="else"):
        command_line.run_command(lambda: raise_(RuntimeError("something else")))
    out_of_gpu = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    assert command_line.run_command(lambda: raise_(out_of_gpu)) == exit_codes.BAD_INPUT


def raise_(error: Exception) -> int:
    raise error


def test_images_that_do_not_fit_into_memory_name_the_options(tmp_path, capsys):
    sides = ["--height", "100000000", "--width", "100000000"]
    arguments = [*MODEL, "--prompt", "a", "--output", str(tmp_path / "o"), "--steps", "1", *sides]
    assert generate.main(arguments) == exit_codes.BAD_INPUT
    error = error_of(capsys)
    assert "--height 100000000, --width 100000000 do not fit into memory" in error
    assert not (tmp_path / "o").exists()


def test_a_gpu_without_room_names_the_options(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(PipelineGenerator, "generate", full)
    arguments = [*MODEL, "--prompt", "a", "--output", str(tmp_path / "o"), "--num-images", "3"]
    assert generate.main(arguments) == exit_codes.BAD_INPUT
    error = error_of(capsys)
    assert "images of the model's own size do not fit into memory, 3 at once (CUDA" in error
    assert "--num-images" in error and "--batch-size" in error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--content", '[{"image": "nix.png"}]'], "error: --content: no image nix.png"),
        (["--prompt", "<image>", "--image", "nix.png"], "error: --prompt: no image nix.png"),
        (["--prompt", "a", "--device", "meta"], "error: --device meta: "),
        (["--prompt", "a", "--tokenizer-model", __file__], "belongs to a checkpoint"),
    ],
)
def test_generate_names_the_option(more, words, tmp_path, capsys):
    assert generate.main([*MODEL, "--output", str(tmp_path / "o"), *more]) == exit_codes.BAD_INPUT
    assert words in error_of(capsys)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("option", ["--model", "--output"])
def test_a_folder_without_permission_is_named_with_its_option(option, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o700)
    given = {"--model": MODEL[1], "--output": str(tmp_path / "o"), option: str(locked / "below")}
    tmp_path.chmod(0o755)
    words = [word for pair in given.items() for word in pair]
    kept = [folder for folder in tmp_path.parents if not folder.stat().st_mode & 0o001]
    for folder in kept:
        folder.chmod(folder.stat().st_mode | 0o011)
    os.seteuid(NOBODY)
    try:
        code = generate.main([*words, "--prompt", "a", "--steps", "1"])
    finally:
        os.seteuid(0)
    error = error_of(capsys)
    assert code == exit_codes.BAD_INPUT, error
    assert error.startswith(f"error: {option} ") and str(locked) in error
    assert "the same command continues" not in error


def test_a_page_has_no_more_samples_than_the_dataset(tmp_path):
    prefix = build_dataset(tmp_path, "edit", 3)
    page = tmp_path / "page.html"
    arguments = [str(prefix), "--tokenizer-model", str(write_tokenizer(tmp_path))]
    assert inspect_data.main([*arguments, "--samples", "1000000", "--output", str(page)]) == 0
    assert page.read_text().count("<article>") == len(SampleStore(prefix)) == 3


def test_a_finished_cache_of_another_dtype_is_refused(tmp_path, capsys):
    prefix = build_dataset(tmp_path, "edit", 2)
    sd = write_stable_diffusion(tmp_path / "sd")
    arguments = [str(prefix), "--stable-diffusion", str(sd), "--image-size", "16"]
    assert cache_latents.main(arguments) == 0
    assert cache_latents.main([*arguments, "--dtype", "bf16"]) == exit_codes.BAD_INPUT
    assert "made with --dtype fp32, not bf16; give that, delete it" in error_of(capsys)
    assert cache_latents.main(arguments) == 0


def test_a_missing_dataset_is_said_before_models_are_read(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    arguments = [nowhere, "--stable-diffusion", str(tmp_path)]
    assert cache_latents.main(arguments) == exit_codes.BAD_INPUT
    error = error_of(capsys)
    assert f"no dataset at {nowhere}" in error and "correct data.blend" not in error


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_build_data_advises_what_it_has(name, tmp_path, capsys):
    (tmp_path / name).touch()
    words = ["--input", str(tmp_path / "*"), "--output", str(tmp_path / "o"), "--captions", "input"]
    assert build_instruct_data.main(words) == exit_codes.BAD_INPUT
    error = error_of(capsys)
    assert "give the folder that holds the images" in error and "--format" not in error


def test_make_report_names_the_option_of_the_quickstart(tmp_path, capsys):
    assert make_report.main(["--output", str(tmp_path / "nowhere")]) == exit_codes.BAD_INPUT
    assert error_of(capsys).endswith("wrote with --output")


def test_a_run_folder_that_cannot_be_made_is_bad_input():
    settings = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    command = [sys.executable, "-m", "megatron_kosmosg", "train", "--config", "toy_pretrain"]
    done = subprocess.run(
        [*command, "logging.output_dir=/proc/none", *settings], capture_output=True, text=True
    )
    assert done.returncode == exit_codes.BAD_INPUT
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: logging.output_dir=/proc/none: ")
