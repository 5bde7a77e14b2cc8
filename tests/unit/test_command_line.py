"""All commands are alike: one shape, one name for one option, one form of errors and exit codes."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from quickstart.steps import plan

from megatron_kosmosg import __version__, command_line, exit_codes
from megatron_kosmosg.cli import main as cli
from megatron_kosmosg.command_line import CommandParser
from megatron_kosmosg.toy import assets
from megatron_kosmosg.toy.cli import evaluate_toy
from megatron_kosmosg.toy.evaluation.metric_row import MetricRow
from megatron_kosmosg.toy.evaluation.toy_results import Results
from tests.support.option_table import options_of

REPOSITORY = Path(__file__).parents[2]
OLD_OPTIONS = REPOSITORY / "tests" / "fixtures" / "c9c3073" / "options.json"

TOKENIZER = ["--tokenizer-model", str(assets.path() / "sentencepiece.model")]

SYNONYMS = {
    "--sd": "--stable-diffusion",
    "--precision": "--dtype",
    "--guidance": "--guidance-scale",
    "--negative": "--negative-prompt",
    "--picture-size": "--image-size",
    "--picture-format": "--image-format",
    "--out": "--output",
    "--out-dir": "--output",
    "--sheet": "--sheet-rows",
    "--num-workers": "--workers",
    "--tokenizer": "--tokenizer-model",
    "--cfg": "--config",
    "--ngpus": "--num-gpus",
}
"""Names that must not come back beside the one that the commands agreed on."""

OF_PROCESSES = {"preprocess"}
OF_THREADS = {"inspect", "cache-latents", "build-data"} | {
    f"evaluate {what}" for what in ("coco", "dreambench", "pairs")
}
"""Commands with --workers, and with --threads."""

TWO_MEANINGS = {
    "--controlnet": "the one that draws; several that the demo's page offers, by names",
    "--input": "files and globs of records; one checkpoint",
    "--run": "a run to judge; the working folder of the toy's training; a run to join",
}
"""Options that two commands have with different types, and what they mean in each."""


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"megatron_kosmosg.{cli.COMMANDS[name].module}")


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(what the user types, its parser) of every command and subcommand."""
    for name in cli.COMMANDS:
        parser = module_of(name).build_parser()
        below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in below:
            yield from ((f"{name} {word}", each) for word, each in action.choices.items())
        if not below:
            yield name, parser
    from quickstart.__main__ import build_parser

    yield "quickstart", build_parser()


PARSERS = dict(parsers())


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        yield from ((name, action) for name in action.option_strings if name.startswith("--"))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_the_same_shape(name):
    module = module_of(name)
    (argument,) = inspect.signature(module.main).parameters.values()
    assert argument.name == "arguments" and argument.default is None
    assert isinstance(module.build_parser(), CommandParser)
    assert module.build_parser().prog == f"kosmosg {name}"


def test_the_parsers_need_no_torch():
    program = (
        "import importlib, sys\nfrom megatron_kosmosg.cli.main import COMMANDS\n"
        "for command in COMMANDS.values():\n"
        "    importlib.import_module(f'megatron_kosmosg.{command.module}').build_parser()\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "megatron", "transformers", "diffusers"} & set(done.stdout.split())


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_is_explained(name):
    silent = [a.option_strings or a.dest for a in PARSERS[name]._actions if not a.help]
    assert not silent


@pytest.mark.parametrize("name", PARSERS)
def test_no_option_has_a_second_name(name):
    found = {word for word, _ in options(PARSERS[name])}
    assert not found & set(SYNONYMS), f"use {[SYNONYMS[word] for word in found & set(SYNONYMS)]}"


def test_workers_are_processes_and_threads_are_threads():
    found = {
        word: {name for name, parser in PARSERS.items() if word in dict(options(parser))}
        for word in ("--workers", "--threads")
    }
    assert found == {"--workers": OF_PROCESSES, "--threads": OF_THREADS}


def test_an_option_of_several_commands_takes_the_same_values():
    kinds: dict[str, set[tuple]] = {}
    for parser in PARSERS.values():
        for word, action in options(parser):
            choices = None if action.choices is None else tuple(action.choices)
            kinds.setdefault(word, set()).add((action.type, choices, type(action)))
    assert {word for word, found in kinds.items() if len(found) > 1} == set(TWO_MEANINGS)


OLD_COMMANDS = {
    "tools/build_instruct_data.py": "build-data",
    "tools/cache_latents.py": "cache-latents",
    "tools/convert_checkpoint.py": "convert",
    "tools/evaluate_toy.py": "evaluate toy",
    "tools/generate.py": "generate",
    "tools/inspect_data.py": "inspect",
    "tools/make_report.py": "toy make-report",
    "tools/make_toy_world.py": "toy make-world",
    "tools/plan.py": "plan",
    "tools/preflight.py": "preflight",
    "tools/preprocess_data.py": "preprocess",
    "tools/train_toy_assets.py": "toy train-assets",
    "megatron_kosmosg.train": "train",
}


@pytest.mark.parametrize("program", OLD_COMMANDS)
def test_what_was_accepted_once_is_accepted(program):
    """Every spelling, choice and positional argument that c9c3073 had."""
    recorded = json.loads(OLD_OPTIONS.read_text())
    assert set(recorded) == set(OLD_COMMANDS)
    for command, before in recorded[program].items():
        parser = PARSERS[f"{OLD_COMMANDS[program]} {command}".strip()]
        now = options_of(parser)[""]
        for word, choices in before["options"].items():
            word = parser.old_spellings.get(word, word)
            assert word in now["options"], word
            choices_now = now["options"][word]  # None: any word, read later
            assert choices_now is None or set(choices or ()) <= set(choices_now), word
        assert before["positionals"] == now["positionals"]


@pytest.mark.parametrize(
    ("name", "unchanged", "renamed"),
    [
        (
            "generate",
            "--model m --output o --prompt p",
            "--sd s --guidance 3 --negative n",
        ),
        ("cache-latents", "data --stable-diffusion s", "--precision bf16 --workers=5"),
        (
            "build-data",
            "--input i --output o --captions input",
            "--picture-size 64 --picture-format png --precision fp16 --workers 5 --sheet 3",
        ),
        ("inspect", "data --config c", "--workers 5"),
        ("convert", "export-hf --input i --output o", "--sd s"),
        ("evaluate toy", "--run instruct=r --output o", "--guidance 3"),
        ("toy make-report", "", "--out o"),
        ("toy train-assets", "vae", "--steps 7"),
    ],
)
def test_an_old_spelling_is_taken_with_one_note(capsys, name, unchanged, renamed):
    parser = module_of(name).build_parser()
    old = [*unchanged.split(), *renamed.split()]
    spellings = parser.old_spellings | {
        word: new
        for typed, each in PARSERS.items()
        if typed.startswith(name)
        for word, new in each.old_spellings.items()
    }
    new = [re.sub(r"^--[a-z-]+", lambda m: spellings.get(m[0], m[0]), word) for word in old]
    assert new != old
    expected, found = vars(parser.parse_args(new)), vars(parser.parse_args(old))
    assert found == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == renamed.count("--") and all(line.startswith("note: --") for line in lines)


def answer(arguments: list[str]) -> int:
    """The exit code of `kosmosg ARGUMENTS`, in this process."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("name", [name for name in PARSERS if name != "quickstart"])
def test_help_is_there_from_any_folder(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert answer([*name.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: kosmosg {name} [-h]")


def test_kosmosg_is_a_module_and_a_program(tmp_path):
    command = [sys.executable, "-m", "megatron_kosmosg", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "usage: python -m megatron_kosmosg COMMAND" in done.stdout
    listed = re.findall(r"^  ([a-z]+(?: [a-z-]+|-[a-z]+)?)  +\w", done.stdout, re.MULTILINE)
    assert listed == list(cli.COMMANDS)
    setup = (REPOSITORY / "setup.py").read_text()
    assert '"kosmosg = megatron_kosmosg.cli.main:start"' in setup and callable(cli.start)


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    program = f"{sys.executable} -u -m megatron_kosmosg --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("usage: ") and not done.stderr
    # 1 is the answer of `status` for a run that failed.
    assert done.returncode in (0, 141), "141 where `head` had ended before all was printed"
    program = f"{sys.executable} -m megatron_kosmosg --help | exec 0<&-; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (exit_codes.READER_LEFT, "", "")


@pytest.mark.parametrize("name", PARSERS)
def test_what_may_be_left_out_is_not_called_required(name):
    positional = [a for a in PARSERS[name]._actions if not a.option_strings]
    optional = [a.dest for a in positional if a.nargs in ("*", "?", argparse.REMAINDER)]
    assert not [a.dest for a in positional if a.dest in optional and a.required]


def test_the_version_is_the_package_s(capsys):
    assert answer(["--version"]) == 0
    first, core, torch = capsys.readouterr().out.splitlines()
    assert first == f"megatron-kosmosg {__version__}, Python {platform.python_version()}"
    assert core == f"megatron-core {importlib.metadata.version('megatron-core')}"
    assert torch.startswith("torch ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "kosmosg needs a command: preprocess, inspect"),
        (["trian"], "no command trian; did you mean train?"),
        (["xyz"], "no command xyz; kosmosg --help lists them"),
        (["toy"], "kosmosg toy needs a command: make-world"),
        (["toy", "make-wolrd"], "kosmosg toy has no command make-wolrd; did you mean toy make-w"),
        (["evaluate", "mars"], "kosmosg evaluate has no command mars"),
        (["generate", "--modle", "m"], "required: --model"),
        (["plan", "--gpu", "h100-80", "--config", "c", "--serach"], "did you mean --search?"),
        (["plan", "--gpu", "h100-80", "--config", "c", "--num-gpus", "0"], "0 is not a whole"),
        (["plan", "--gpu", "h100-80", "--config", "{tmp}/none.yaml"], "none.yaml: no such file"),
        (["train", "--config", "{tmp}/none.yaml"], "none.yaml: no such file"),
        (["train", "stage=align", "logging.output_dir=x", "modl.vocab_size=3"], "modl"),
        (["preprocess", "--kind", "txt"], "invalid choice: 'txt'"),
        (["preprocess", "--tokenizer-model", "{tmp}/n"], "{tmp}/n is not a file"),
        (
            "preprocess --kind text --output-prefix o --input {tmp}/n".split() + TOKENIZER,
            "--input {tmp}/n matches no file",
        ),
        (["preprocess", "--workers", "0"], "argument --workers: 0 is not a whole number from 1"),
        (["inspect", "p", "--seed", str(2**64)], "whole number from 0 to 18446744073709551615"),
        (["inspect", "p"], "give --tokenizer-model or --config"),
        (["cache-latents", "p", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["build-data", "--threshold", "1"], "1 is not a number between 0 and 1"),
        (["build-data", "--entity-prompt", "{tmp}/n"], "{tmp}/n is not a file"),
        (["preflight", "node", "--gpus", "many"], "many is not a whole number"),
        (["preflight", "network", "--timeout", "0"], "0 is not a number above 0"),
        (["convert", "verify", "--tolerance", "nan"], "nan is not a number from 0 up"),
        (["generate", "--guidance-scale", "inf"], "inf is not a number from 0 up"),
        (["evaluate", "toy", "--output", "o", "--run", "x"], "--run NAME=FOLDER"),
        (["toy", "make-world", "--output", "o", "--size", "-1"], "-1 is not a whole number"),
        (["toy", "make-report", "--output", "{tmp}/none"], "none"),
        (["toy", "train-assets", "export", "--train-iters", "5"], "goes with one of vae, text"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(arguments, words, capsys, tmp_path):
    command = [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    assert answer(command) == exit_codes.BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert words.replace("{tmp}", str(tmp_path)) in lines[0]


def raises(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "message"),
    [
        (lambda: exit_codes.DONE, 0, ""),
        (raises(ValueError("weight=0")), 2, "error: weight=0\n"),
        (raises(OSError("no such file")), 2, "error: no such file\n"),
        (raises(KeyboardInterrupt()), 130, "stopped\n"),
    ],
)
def test_how_a_command_ends(work, code, message, capsys):
    assert command_line.run_command(work, "stopped") == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("thresholds", "code"), [((0.5, None), exit_codes.DONE), ((0.5, 0.95), exit_codes.MISSED)]
)
def test_an_evaluation_says_whether_thresholds_are_missed(thresholds, code, monkeypatch, tmp_path):
    rows = [MetricRow("align", "cosine", 0.9, "", 8, 0, threshold=each) for each in thresholds]
    monkeypatch.setattr(evaluate_toy, "evaluate", lambda args: Results(rows, []))
    arguments = ["evaluate", "toy", "--run", "instruct=r", "--output", str(tmp_path)]
    assert answer(arguments) == code
    assert (tmp_path / "metrics.json").is_file()


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line.run_command(lambda: 1 // 0)


def test_ctrl_c_while_a_command_is_imported_is_no_traceback(monkeypatch, capsys):
    def interrupt(name: str) -> ModuleType:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupt)
    assert cli.main(["plan"]) == exit_codes.INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("started", "prog"),
    [
        ("/usr/bin/kosmosg", "kosmosg plan"),
        ("tools/plan.py", "tools/plan.py"),
        ("/x/megatron_kosmosg/__main__.py", "python -m megatron_kosmosg plan"),
        ("/x/megatron_kosmosg/train.py", "python -m megatron_kosmosg.train"),
    ],
)
def test_a_command_is_called_as_the_user_called_it(started, prog, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    assert command_line.command_parser("plan", "Plans.").prog == prog


def test_notes_are_said_by_one_rank(monkeypatch, capsys):
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        command_line.note("said once")
    assert capsys.readouterr().err == "note: said once\n"


def test_the_quickstart_s_commands_are_understood(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # where it runs them
    steps = plan(REPOSITORY, tmp_path, fast=True, ablations=True)
    names = {command.module.split(".")[-1]: name for name, command in cli.COMMANDS.items()}
    (tmp_path / "dreambench" / "toy" / "dreambooth").mkdir(parents=True)  # a step makes it
    seen = set()
    for _, program, *arguments in (step.command for step in steps):
        if program.startswith("tools/"):
            module_of(names[Path(program).stem]).build_parser().parse_args(arguments)
            seen.add(program)
    assert {"tools/convert_checkpoint.py", "tools/generate.py", "tools/evaluate_toy.py"} < seen
    assert not capsys.readouterr().err  # no note on an earlier spelling


def test_documents_examples_and_job_scripts_use_the_names_of_today():
    folders = ("docs", "slurm", "benchmarks", "examples/inference", "examples/quickstart", "tools")
    files = [path for name in folders for path in (REPOSITORY / name).rglob("*.*")]
    files = [path for path in files if path.suffix in (".md", ".sh", ".py")]
    assert len(files) > 40
    old = "|".join(word for word in SYNONYMS if word != "--out")  # the quickstart still takes it
    for path in [REPOSITORY / "README.md", REPOSITORY / ".ci" / "run", *files]:
        found = re.findall(rf"(?:{old})(?![\w-])", path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found}"


def test_the_documents_list_every_command_and_its_tool():
    text = (REPOSITORY / "docs" / "commands.md").read_text()
    (table,) = re.findall(r"\| command \| in a checkout .*?\n\n", text, re.DOTALL)
    rows = [line.split(" | ")[:2] for line in table.strip().splitlines()[2:]]
    listed = [name for names, _ in rows for name in re.findall(r"`([^`]+)`", names)]
    assert listed == list(cli.COMMANDS)
    tools = sorted(path.name for path in (REPOSITORY / "tools").glob("*.py"))
    assert sorted(re.findall(r"`tools/([a-z_]+\.py)`", table)) == tools


def test_the_documents_explain_every_exit_code():
    codes = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    assert len(set(codes.values())) == len(codes) == 7
    text = (REPOSITORY / "docs" / "running.md").read_text()
    (table,) = re.findall(r"\| exit code \| of every command .*?\n\n", text, re.DOTALL)
    assert [int(code) for code in re.findall(r"^\| (\d+) ", table, re.MULTILINE)] == sorted(
        codes.values()
    )
