"""tools/convert_checkpoint.py import-fairseq: bad input ends in one line and writes nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from tests.support.authors_files import (
    HEADS,
    clip_file,
    fuse_tower,
    load_golden,
    weights_of,
    without_tower,
    write_file,
)
from tests.support.data_helpers import write_tokenizer
from tools import convert_checkpoint

DECODER = "gpt_model.decoder."


@pytest.fixture(scope="module")
def golden() -> dict:
    torch.set_num_threads(1)
    return load_golden(2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the tool; `output` is where it writes."""

    def run(*arguments: object, output: Path = tmp_path / "out") -> tuple[int, str, str]:
        command = ["convert_checkpoint.py", "import-fairseq", "--output", output, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        code = convert_checkpoint.main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def refused(result: tuple[int, str, str], output: Path, *words: str) -> None:
    """The tool said all of `words` in an error, without a traceback, and wrote nothing."""
    code, _, error = result
    assert code == 2 and "Traceback" not in error
    for word in words:
        assert word in error, error
    assert not output.exists()


def test_a_good_file_is_reported(tmp_path: Path, golden: dict, run) -> None:
    path = write_file(tmp_path / "final.pt", weights_of(golden, "final"), golden)
    code, printed, error = run("--input", path, *HEADS)
    assert code == 0, error
    lines = printed.splitlines()
    assert lines[0].startswith("final file -> stage instruct, ") and lines[0].endswith("fp32")
    assert any("the frozen U-Net" in line for line in lines)
    assert any("no tokenizer" in line for line in lines)
    assert lines[-1] == str(tmp_path / "out" / "iter_0000000")
    code, _, error = run("--input", path, *HEADS)
    assert code == 2 and "already holds iter_0000000; give a new folder" in error


def test_a_file_of_mixed_precision_is_stored_in_the_widest(tmp_path: Path, golden, run) -> None:
    tensors = {
        name: value if name.endswith("layer_norm.weight") else value.half()
        for name, value in weights_of(golden, "stage1").items()
    }
    path = write_file(tmp_path / "stage1.pt", tensors, golden)
    code, printed, error = run("--input", path, *HEADS)
    assert code == 0 and "fp32" in printed.splitlines()[0], error
    stored = CheckpointTensors(tmp_path / "out")
    assert {info.dtype for info in stored.names().values()} == {torch.float32}
    name = f"{DECODER}layers.2.ffn.fc1.weight"
    kept = stored.read("decoder.layers.2.mlp.linear_fc1.weight")
    assert torch.equal(kept, tensors[name].float())


def test_a_config_file_of_another_model_is_refused(tmp_path: Path, golden: dict, run) -> None:
    path = write_file(tmp_path / "stage1.pt", weights_of(golden, "stage1"), golden)
    config = tmp_path / "other.yaml"
    config.write_text("stage: align\nmodel: {decoder: {hidden_size: 64, hidden_dropout: 0.2}}\n")
    refused(
        run("--input", path, "--config", config, *HEADS),
        tmp_path / "out",
        "stage is pretrain in the file, align in the config",
        "model.decoder.hidden_size is 48 in the file, 64 in the config",
    )
    config.write_text("model: {decoder: {hidden_dropout: 0.2}}\n")
    code, _, error = run("--input", path, "--config", config, *HEADS)
    assert code == 0, error
    assert CheckpointTensors(tmp_path / "out").config.model.decoder.hidden_dropout == 0.2


def without(tensors: dict, *names: str) -> dict:
    return {name: value for name, value in tensors.items() if name not in names}


def test_keys_that_are_missing_or_left_over_are_listed(tmp_path: Path, golden: dict, run) -> None:
    tensors = weights_of(golden, "stage1")
    fc2 = f"{DECODER}layers.1.ffn.fc2.bias"
    damaged = without(tensors, fc2) | {
        f"audio_model.layers.{layer}.weight": torch.ones(2) for layer in range(3)
    }
    path = write_file(tmp_path / "stage1.pt", damaged, golden)
    refused(
        run("--input", path, *HEADS),
        tmp_path / "out",
        "1 tensor missing",
        fc2,
        "3 tensors without a place in the model",
        "audio_model.layers.[0-2].weight",
    )
    path = write_file(tmp_path / "stage1.pt", without(damaged) | {fc2: tensors[fc2]}, golden)
    code, printed, error = run("--input", path, "--drop", "audio_model.*", *HEADS)
    assert code == 0, error
    assert "left out (as asked): 3" in printed


WRONG = {
    "a wrong size": (
        {f"{DECODER}layers.0.ffn.fc2.weight": torch.ones(48, 79)},
        [],
        ["decoder.layers.0.mlp.linear_fc2.weight", "[48, 79]", "[48, 80]"],
    ),
    "an untied head": (
        {f"{DECODER}output_projection.weight": torch.ones(101, 48)},
        [],
        ["output_projection.weight differs from", "ties the two"],
    ),
    "heads that do not divide": (
        {},
        ["model.aligner.num_attention_heads=5"],
        ["24 rows", "5 attention heads", "num_attention_heads"],
    ),
    "heads that nobody states": (
        {},
        ["model.aligner.num_attention_heads=4"],
        ["cannot be read from the weights", "model.vision.num_attention_heads=N"],
    ),
    "another size in an override": (
        {},
        [*HEADS, "model.decoder.num_layers=24"],
        ["model.decoder.num_layers is 3 in the file, 24 in the config"],
    ),
    "the file of another stage": (
        {},
        [*HEADS, "stage=instruct"],
        ["stage is align in the file, instruct in the config"],
    ),
    "an unknown setting": ({}, [*HEADS, "model.decodr.num_layers=3"], ["unknown key", "decod"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, golden: dict, run, what: str) -> None:
    changed, overrides, words = WRONG[what]
    path = write_file(tmp_path / "stage2.pt", weights_of(golden, "stage2") | changed, golden)
    if "heads" not in what and not overrides:
        overrides = HEADS
    if what == "heads that do not divide":
        overrides = ["model.vision.num_attention_heads=2", *overrides]
    refused(run("--input", path, *overrides), tmp_path / "out", *words)


def test_files_of_another_kind_are_refused(tmp_path: Path, golden: dict, run) -> None:
    text = tmp_path / "text.pt"
    text.write_text("AuthenticationFailed: key based authentication is not permitted")
    refused(run("--input", text), tmp_path / "out", "not a file of torch.save")
    refused(run("--input", tmp_path / "none.pt"), tmp_path / "out", "no such file")
    path = write_file(tmp_path / "stage1.pt", weights_of(golden, "stage1"), golden)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(run("--input", path, *HEADS), tmp_path / "out", "ends too early", "again")
    bare = tmp_path / "bare.pt"
    torch.save(golden["model"], bare)
    refused(run("--input", bare, *HEADS), tmp_path / "out", "needs a key 'model'")


def test_objects_in_the_file_need_trust(tmp_path: Path, golden: dict, run) -> None:
    options = argparse.Namespace(**golden["cfg"]["model"])
    path = write_file(
        tmp_path / "stage1.pt", weights_of(golden, "stage1"), golden, cfg=None, args=options
    )
    refused(run("--input", path, *HEADS), tmp_path / "out", "argparse.Namespace", "--trust-pickle")
    code, _, error = run("--input", path, "--trust-pickle", *HEADS)
    assert code == 0, error


def test_decoder_heads_come_from_the_file_or_the_user(tmp_path: Path, golden: dict, run) -> None:
    tensors = weights_of(golden, "stage1")
    path = write_file(tmp_path / "stage1.pt", tensors, golden)
    more = "model.decoder.num_attention_heads="
    refused(
        run("--input", path, *HEADS, more + "8"),
        tmp_path / "out",
        "num_attention_heads is 4 in the file, 8 in the config",
    )
    path = write_file(tmp_path / "stage1.pt", tensors, golden, cfg={"model": {}})
    refused(run("--input", path, *HEADS), tmp_path / "out", "add model.decoder.num_attention_heads")
    code, _, error = run("--input", path, *HEADS, more + "4")
    assert code == 0, error
    text = (tmp_path / "out" / "iter_0000000" / "config.yaml").read_text()
    assert text.count("num_attention_heads: 4") >= 2  # decoder and resampler


def test_a_file_without_a_tower_needs_one(tmp_path: Path, golden: dict, run) -> None:
    tensors = without_tower(weights_of(golden, "stage1"))
    path = write_file(tmp_path / "stage1.pt", tensors, golden)
    refused(run("--input", path, *HEADS), tmp_path / "out", "no image tower", "--vision")
    fused = {n: t for n, t in fuse_tower(golden["model"]).items() if ".resblocks.1." not in n}
    torch.save({n.removeprefix("img_model."): t for n, t in fused.items()}, tmp_path / "part.pt")
    refused(
        run("--input", path, "--vision", tmp_path / "part.pt", *HEADS),
        tmp_path / "out",
        "visual.transformer.resblocks.1.attn.in_proj_weight",
    )
    text_only = tmp_path / "text_only.pt"
    torch.save({"transformer.x": torch.ones(1)}, text_only)
    refused(run("--input", path, "--vision", text_only, *HEADS), tmp_path / "out", "ViT-L-14-sd.pt")
    code, printed, error = run(
        "--input", path, "--vision", clip_file(tmp_path / "c", golden), *HEADS
    )
    assert code == 0 and "55 image-tower tensors from" in printed, error


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, golden: dict, run) -> None:
    path = write_file(tmp_path / "stage1.pt", weights_of(golden, "stage1"), golden)
    tokenizer = write_tokenizer(tmp_path)
    refused(
        run("--input", path, "--tokenizer-model", tokenizer, *HEADS),
        tmp_path / "out",
        "token ids, the embedding has 101 rows",
    )
    refused(run("--input", path, "--tokenizer-model", path, *HEADS), tmp_path / "out", str(path))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, golden: dict, run) -> None:
    path = write_file(tmp_path / "stage1.pt", weights_of(golden, "stage1"), golden)
    code, _, error = run("--input", path, *HEADS, output=path)
    assert code == 2 and "is a file; give a folder" in error
