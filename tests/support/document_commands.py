"""The commands that documents show, found in their blocks and understood without being run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_kosmosg.cli import main as cli
from megatron_kosmosg.config.input_paths import CONFIGS
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.needed_files import check_stage_needs
from megatron_kosmosg.config.validate import validate_layout
from megatron_kosmosg.stages import stage_facts

REPOSITORY = Path(__file__).parents[2]
STARTS = re.compile(
    r"^(?:(?:[A-Z_]+=\S*|srun|mpirun|sudo|-\S+|\d+|--\S+=\S+) )*"
    r"(?P<program>kosmosg|python -m \S+|python \S+\.py|tools/\S+\.py|bash \S+\.sh"
    r"|sbatch(?: -\S+)* \S+\.sh|pytest) ?(?P<rest>.*)$"
)
OWN_FILE = re.compile(r": \S+ is not a (?:file|folder);")
"""A file of the reader, which is not here."""
READS_SETTINGS = ("train", "plan", "rehearse")


def block_lines(page: str) -> Iterator[str]:
    """Lines of the page's fenced and indented blocks, continued ones joined, prompts taken off."""
    is_fenced, blocks = False, []
    for line in page.replace("\\\n", " ").splitlines():
        if line.strip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            blocks.append(line.strip().removeprefix("$ "))
    yield from blocks


def problems(line: str) -> list[str]:
    """What is wrong with a line, if it is a command that this repository knows; a line that breaks
    off (`...`) and a job array's `--wrap` are looked at as far as they go."""
    found = STARTS.match(line)
    if found is None:
        return []
    program = found["program"]
    words = _words(found["rest"])
    if program.startswith(("bash", "sbatch", "python tools/", "tools/", "python examples/")):
        script = REPOSITORY / program.split()[-1]
        if not script.is_file():
            return [f"there is no {program.split()[-1]}"]
        if program.startswith("tools/") and not os.access(script, os.X_OK):
            return [f"{program} cannot be executed"]
    if program == "pytest":
        paths = [word for word in words if word.startswith("tests/")]
        return [f"there is no {path}" for path in paths if not (REPOSITORY / path).exists()]
    if program.startswith("python -m "):
        module = program.split()[-1]
        if module == "megatron_kosmosg.train":
            return _of_command("train", words)
        if module != "megatron_kosmosg":
            return [] if importlib.util.find_spec(module) else [f"there is no module {module}"]
    elif program.split()[-1].startswith("tools/"):
        return _of_command(_name_of_tool(Path(program.split()[-1]).stem), words)
    elif program != "kosmosg":
        return []
    return _of_kosmosg(words)


def _words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&;|>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = []
    for word in lexer:
        if word in ("&&", ";", "|", ">", "&"):
            break
        words.append(word)
    return words


def _name_of_tool(stem: str) -> str:
    return next(n for n, c in cli.COMMANDS.items() if c.module.split(".")[-1] == stem)


def _of_kosmosg(words: list[str], num_ranks: int | None = None) -> list[str]:
    if not words or words[0] in ("--help", "--version", "COMMAND"):
        return []
    if words[0] == "launch" and "--ranks" in words:
        parser = importlib.import_module("megatron_kosmosg.cli.launch").build_parser()
        wrong = _of_command("launch", [word for word in words[1:] if word != "..."])
        if wrong:
            return wrong
        launched = parser.parse_args(words[1:])
        ranks = launched.ranks * launched.nodes
        return _of_kosmosg([launched.command, *launched.arguments], ranks)
    for number in (2, 1):
        name = " ".join(words[:number])
        if name in cli.COMMANDS:
            return _of_command(name, words[number:], num_ranks)
    return [f"kosmosg has no command {words[0]}"]


def _of_command(name: str, words: list[str], num_ranks: int | None = None) -> list[str]:
    """num_ranks: those that `launch` would start."""
    parser = importlib.import_module(f"megatron_kosmosg.{cli.COMMANDS[name].module}").build_parser()
    if "..." in words or not words:
        return _of_options(parser, words)
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        try:
            parsed = parser.parse_args(words)
        except SystemExit as end:
            if end.code == 0 or OWN_FILE.search(output.getvalue()):
                return _of_options(parser, words)
            return [output.getvalue().strip()]
    if output.getvalue():
        return [output.getvalue().strip()]  # an earlier spelling
    config = getattr(parsed, "config", None)
    if name not in READS_SETTINGS or config is None:
        return []
    if not (REPOSITORY / config).is_file() and not (CONFIGS / f"{config}.yaml").is_file():
        return []  # the reader's own
    path = REPOSITORY / config if (REPOSITORY / config).is_file() else config
    try:
        run = load_config(path, list(parsed.overrides))
        if name == "train":
            facts = stage_facts(run.stage)
            check_stage_needs(run, facts)
            validate_layout(run, num_ranks or run.parallel.world_size or 1, facts)
    except ValueError as error:
        return [str(error)]
    return []


def _of_options(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Of a command that breaks off: whether it has the options."""
    known = {option for action in _all_actions(parser) for option in action.option_strings}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"no option {option}" for option in options if option not in known]


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        choices = action.choices if isinstance(action.choices, dict) else {}
        for below in choices.values():
            if isinstance(below, argparse.ArgumentParser):
                yield from _all_actions(below)
