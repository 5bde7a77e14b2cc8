"""A command that meets a full disk says in one line where, and which option to change: code 2."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import pytest

from megatron_kosmosg import exit_codes
from megatron_kosmosg.cli.main import COMMANDS
from megatron_kosmosg.toy import assets

TOYS = assets.path()
SPM = TOYS / "sentencepiece.model"
COMMAND_LINES = {
    "generate": f"generate --model {TOYS / 'kosmosg'} --prompt dog --steps 1 --output {{disk}}/o",
    "inspect": f"inspect stores/text --tokenizer-model {SPM} --output {{disk}}/page.html",
    "preprocess": "preprocess --kind text --input {tmp}/records.jsonl "
    f"--tokenizer-model {SPM} --output-prefix {{disk}}/text",
    "make-world": "toy make-world --size 8 --output {disk}/world",
    "export-hf": "convert export-hf --input runs/instruct "
    "--stable-diffusion {past}/models/stable-diffusion --output {disk}/hf",
    "export-mllm": "convert export-mllm --input runs/pretrain --output {disk}/mllm",
    "import-hf": "convert import-hf --input export --output {disk}/run",
}


LARGE = ("preprocess", "make-world", "export-hf", "export-mllm", "import-hf")
"""Commands that fill what is left on the disk while they write."""
CASES = [(name, 0) for name in COMMAND_LINES] + [(name, 24 << 10) for name in LARGE]


@pytest.mark.parametrize(("name", "free"), CASES)
def test_a_full_disk_is_one_error_with_the_path(
    name, free, past, small_disk, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(past)
    texts = [{"text": f"text number {i}. " + "and more of it " * 40} for i in range(200)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, texts)))
    fill(small_disk, free)
    line = COMMAND_LINES[name].format(disk=small_disk, past=past, tmp=tmp_path).split()
    command = next(key for key in COMMANDS if " ".join(line).startswith(f"{key} "))
    module = importlib.import_module(f"megatron_kosmosg.{COMMANDS[command].module}")
    code = module.main(line[len(command.split()) :])
    said = capsys.readouterr().err
    (error,) = [each for each in said.splitlines() if each.startswith("error: ")]
    assert code == exit_codes.BAD_INPUT, said
    assert "No space left on device" in error and "Traceback" not in said
    option = "--output-prefix" if name == "preprocess" else "--output"
    assert str(small_disk) in error and error.endswith(f"make room there, or give another {option}")


def fill(disk: Path, leave: int) -> None:
    """Takes all room on the disk but `leave` bytes."""
    asked = ["df", "--block-size=1", "--output=avail", str(disk)]
    room = int(subprocess.run(asked, capture_output=True, check=True).stdout.split()[1])
    command = ["fallocate", "-l", str(room - leave), str(disk / "filler")]
    subprocess.run(command, check=True)
