"""Every wrong value of every option of every command is one `error:` line and exit code 2.

The options come from the parsers themselves, so a new one is tried as soon as it is there. All run
in this process; tests/unit/test_command_line.py starts each command as a user does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from megatron_kosmosg.cli.main import COMMANDS
from megatron_kosmosg.preprocess.shards_of_dataset import list_shards
from megatron_kosmosg.toy.stand_in_networks import write_dino
from tests.support.evaluated_images import write_coco, write_dreambooth
from tests.support.scoring_networks import write_inception

SECONDS = 200
"""A wrong value is found before any work begins; the libraries may have to be imported."""

WRONG_BY_TYPE = {
    "positive_int": ["0", "-1", "1.5", "x", "", "nan", "\u00b2"],
    "natural_int": ["-1", "1.5", "x", "", "nan"],
    "_count": ["-1", "x", ""],
    "seed": ["-1", "x", "", str(2**64), "1.0"],
    "share": ["nan", "-0.1", "1.1", "x", ""],
    "number_from_zero": ["nan", "inf", "-1", "x", ""],
    "positive_number": ["nan", "0", "-1", "inf", ""],
    "_host_and_port": ["x", "", ":1", "node0:0", "node0:99999", "node0:x"],
    "existing_folder": ["missing", "", "text-file"],
    "existing_file": ["missing", "", "folder", "b\u00ecld-\u732b"],
}
INPUTS = {
    "--input": ["missing", "", "b\u00ecld-\u732b", "text-file/below"],
    "--model": ["missing", "", "folder", "text-file", "b\u00ecld-\u732b"],
    "--stable-diffusion": ["missing", "", "folder", "text-file"],
    "--image-root": ["missing", "text-file", ""],
    "--config": ["missing", "missing.yaml", "", "folder", "binary-file", "text-file"],
    "--prompts": ["missing", "folder", "binary-file", ""],
    "--image": ["missing", "folder", "text-file"],
    "--lora": ["missing", "folder", "text-file"],
    "--controlnet": ["missing", "folder", "text-file"],
    "--control-image": ["missing", "folder", "text-file"],
    "--captions": ["missing", "folder", "text-file", ""],
    "--entities": ["missing", "folder", "text-file", ""],
    "--masks": ["missing", "folder", "text-file", ""],
    "--a": ["missing", "folder", "text-file"],
    "--b": ["missing", "folder", "text-file"],
    "--pairs": ["missing", "folder", "text-file", "binary-file", ""],
    "--dino": ["missing", "folder", "text-file", ""],
    "--clip": ["missing", "folder", "text-file", ""],
    "--real-statistics": ["folder", "text-file", "text-file/below", ""],
    "--inception": ["missing", "folder", "text-file", ""],
    "--run": ["missing", "folder", "text-file", ""],
    "--vision": ["missing", "folder"],
    "prefix": ["missing", "folder", "text-file", ""],
    "shards": ["missing", "folder", "text-file", ""],
    "prefixes": ["missing", "folder", "text-file", ""],
    "--folder": [""],
    "--remote": [
        "",
        "folder",
        "s3://",
        "nothing://bucket/folder",
        "file:///",
        "https://u:p@host/x",
    ],
    "--output": ["text-file/below", ""],
    "--output-prefix": ["text-file/below", "", "folder/"],
    "--json": ["text-file/below", "folder", ""],
    "--svg": ["text-file/below", "folder", ""],
    "--write-config": ["text-file/below", "folder", ""],
    "--gpu": ["h100", "text-file", "missing.yaml", ""],
    "--score-ranks": ["64", "0xl40s", "1.5xl40s", "8xa100", "8xmissing.yaml", "8xl40s,", ""],
    "--page": ["text-file/below", "folder", ""],
    "--device": ["x", "cuda:99", "meta", ""],
    "--field": ["x", "=", "nothing=else", ""],
    "--assume": ["x", "x=y", "=", ""],
    "overrides": ["x", "=", "a.b=1", "training.train_iters=x", "training.train_iters=", "stage=x"],
    "command": ["x", ""],
    "--name": ["a/b", "", ".."],
    "--host": [""],
}
PATHS = ("existing_file", "existing_folder", "file_path", "some_text")
"""Types of options that name files and folders."""
FREE = {
    "--prompt", "--content", "--negative-prompt", "--drop", "arguments", "--part", "--assets",
    "--tokenizer-model",
}  # fmt: skip
"""Options that take any text, or any folder to be made, or stand above."""


def leaves() -> Iterator[tuple[str, ...]]:
    for name in COMMANDS:
        for path, _ in _leaves(name.split(), parser_of(name)):
            yield tuple(path)


def parser_of(name: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"megatron_kosmosg.{COMMANDS[name].module}").build_parser()


def _leaves(path: list[str], parser: argparse.ArgumentParser):
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield path, parser
    for action in below:
        for word, sub in action.choices.items():
            yield from _leaves([*path, word], sub)


def leaf_parser(path: tuple[str, ...]) -> argparse.ArgumentParser:
    for name in COMMANDS:
        for found, parser in _leaves(name.split(), parser_of(name)):
            if tuple(found) == path:
                return parser
    raise AssertionError(path)


def wrong_values(action: argparse.Action) -> list[str]:
    name = action.option_strings[-1] if action.option_strings else action.dest
    if action.nargs == 0 or name == "--help":
        return []
    if action.choices is not None:
        return ["nonsense", ""]
    kind = getattr(action.type, "__name__", "")
    values = [*WRONG_BY_TYPE.get(kind, []), *INPUTS.get(name, [])]
    assert values or name in FREE, f"{name} of type {kind}: say what is wrong for it"
    return values


@pytest.fixture(scope="module")
def files(past, tmp_path_factory) -> Path:
    """A folder with what commands read, and what they cannot."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("stores", "models", "runs", "export"):
        (folder / name).symlink_to(past / name)
    (folder / "folder").mkdir()
    (folder / "text-file").write_text("just a text\n")
    (folder / "binary-file").write_bytes(bytes(range(256)) * 4)
    (folder / "records.jsonl").write_text(json.dumps({"text": "a text. and one more"}) + "\n")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a dog"}) + "\n")
    write_dreambooth(folder / "dreambooth")
    write_coco(folder / "coco")
    write_inception(folder / "inception.pth")
    (folder / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "a.png")
    write_dino(folder / "dino.pth")
    list_shards(str(folder / "sharded"), [str(folder / "stores" / "caption")])
    return folder


BASES = {
    (
        "preprocess",
    ): "--kind text --input records.jsonl --tokenizer-model {spm} --output-prefix o/x",
    ("inspect",): "stores/caption --output o/page.html",
    ("shards",): "sharded",
    ("cache-latents",): "stores/caption --stable-diffusion {sd} --name made --image-size 16",
    ("build-data",): "--input text-file --output o/built --captions folder",
    ("plan",): "--config toy_instruct --gpu a100-80",
    ("rehearse",): "--config toy_instruct",
    ("doctor",): "",
    ("status",): "runs/instruct",
    ("preflight", "node"): "--folder folder",
    ("preflight", "network"): "",
    ("launch",): "--ranks 1 nothing",
    ("score-rank",): "--run runs/instruct --wait 1",
    ("train",): "--config toy_pretrain --dry-run",
    ("convert", "import-fairseq"): "--input text-file --output o/run",
    ("convert", "import-kosmos2"): "--input export/mllm --output o/run",
    ("convert", "export-hf"): "--input runs/instruct --output o/export --stable-diffusion {sd}",
    ("convert", "export-lora"): "--input runs/instruct --output o/lora",
    ("convert", "export-mllm"): "--input runs/pretrain --output o/mllm",
    ("convert", "import-hf"): "--input export --output o/run",
    ("convert", "verify"): "--a text-file --b export",
    ("generate",): "--model export --prompt dog --output o/pictures --steps 1",
    ("demo",): "--model export",
    (
        "evaluate",
        "dreambench",
    ): "--dreambooth dreambooth --model export --dino dino.pth --output o/x"
    " --num-prompts 1 --num-images 1 --steps 1",
    (
        "evaluate",
        "coco",
    ): "--coco coco --model export --inception inception.pth --output o/x"
    " --num-captions 2 --steps 1",
    ("evaluate", "pairs"): "--generated pictures --reference pictures --dino dino.pth --output o/x",
    ("evaluate", "toy"): "--run name=runs/instruct --output o/evaluated --fast",
    ("toy", "make-world"): "--output o/world --size 8",
    ("toy", "make-dreambench"): "--output o/dreambench",
    ("toy", "make-report"): "--output folder",
    ("toy", "train-assets"): "tokenizer --assets o/assets",
}


class TookTooLong(Exception):
    pass


def ring(number: int, frame: object) -> None:
    raise TookTooLong


def problem_of(path: tuple[str, ...], words: list[str], capsys, needed: str = "") -> str | None:
    """What is wrong with how the command ended; None if it is as it should be, and says
    `needed`."""
    names = [name for name in COMMANDS if " ".join(path).startswith(name)]
    name = max(names, key=len)
    module = importlib.import_module(f"megatron_kosmosg.{COMMANDS[name].module}")
    arguments = [*path[len(name.split()) :], *words]
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        code = module.main(arguments)
    except SystemExit as ended:
        code = ended.code
    except TookTooLong:
        return f"still at work after {SECONDS} s"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        stderr = capsys.readouterr().err
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if code != 2:
        return f"exit code {code}: {stderr[-200:]!r}"
    if len(lines) != 1 or "Traceback" in stderr:
        return f"said {stderr[-300:]!r}"
    return None if needed in lines[0] else f"did not say {needed!r}: {lines[0]}"


def replaced(words: list[str], action: argparse.Action, value: str) -> list[str]:
    """The command line with `value` for this option or argument."""
    if not action.option_strings:
        if action.nargs in ("*", "..."):
            return [*words, value]
        return [value, *words[1:]]
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word not in action.option_strings:
            kept.append(word)
        skip = word in action.option_strings
    return [*kept, f"{action.option_strings[-1]}={value}"]


@pytest.mark.parametrize("path", leaves(), ids=" ".join)
def test_a_wrong_value_is_one_error_and_code_2(path, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers of libraries, on old streams
    for variable in [name for name in os.environ if name.startswith(("SLURM", "RANK"))]:
        monkeypatch.delenv(variable)
    models = files / "models"
    words = (
        BASES[path]
        .format(spm=next(models.rglob("*.model")), sd=models / "stable-diffusion")
        .split()
    )
    found, tried = [], 0
    for action in leaf_parser(path)._actions:
        if path == ("toy", "train-assets") and action.dest == "run":
            continue  # read by parts that take hours alone
        for value in wrong_values(action):
            tried += 1
            line = replaced(words, action, value)
            # An unset variable of a shell would otherwise be the current folder.
            is_path = getattr(action.type, "__name__", "") in PATHS
            problem = problem_of(path, line, capsys, "is empty" if is_path and not value else "")
            if problem is not None:
                shown = action.option_strings[-1:] or action.dest
                found.append(f"{shown} {value!r}: {problem}")
    assert tried or path in (("doctor",), ("preflight", "network"))
    assert not found, f"{len(found)} of {tried}:\n" + "\n".join(found)
    left = sorted((files / "o").rglob("*")) if (files / "o").exists() else []
    assert not left, f"a refused command left {left}"
