"""The options of command-line programs, from the parsers that they build when they are started.

usage: python tests/support/option_table.py PROGRAM... (paths, or names of modules)
Prints {program: {command or "": {"options": {spelling: choices or null}, "positionals": [...]}}}
on one line.
Earlier spellings that a parser still takes count. A program is run up to the moment when it reads
its arguments, so nothing else of it has to be known.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READERS = (
    "parse_args",
    "parse_known_args",
    "parse_intermixed_args",
    "parse_known_intermixed_args",
)


class _Reading(BaseException):
    """Ends a program that is about to read its arguments."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        self.parser, self.arguments = parser, arguments


def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of a script (a path) or module that is started with no arguments."""
    argv = sys.argv
    sys.argv = [program]
    try:
        with _stopped_at_the_parser():
            if program.endswith(".py"):
                sys.path.insert(0, str(Path(program).parent))
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
    except _Reading as reading:
        return _under(reading.parser, reading.arguments)
    finally:
        sys.argv = argv
    raise AssertionError(f"{program} ended without reading its arguments")


def options_of(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """{command, "" without one: {"options", "positionals"}} of a parser and its subcommands."""
    commands = _commands(parser)
    if not commands:
        return {"": _own_options(parser)}
    return {name: _own_options(command) for name, command in commands.items()}


def _own_options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    options, positionals = {}, []
    for action in parser._actions:
        choices = None if action.choices is None else [str(choice) for choice in action.choices]
        options.update(dict.fromkeys(action.option_strings, choices))
        for old, new in getattr(parser, "old_spellings", {}).items():
            if new in action.option_strings:
                options[old] = choices
        if not action.option_strings:
            positionals.append({"nargs": action.nargs, "choices": choices})
    return {"options": options, "positionals": positionals}


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _under(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.ArgumentParser:
    """The parser of the commands that `arguments` begin with: a wrapper may name its own."""
    for word in sys.argv[1:] if arguments is None else arguments:
        if word not in _commands(parser):
            break
        parser = _commands(parser)[word]
    return parser


@contextmanager
def _stopped_at_the_parser() -> Iterator[None]:
    kept = {name: getattr(argparse.ArgumentParser, name) for name in READERS}

    def stop(parser, args=None, namespace=None):
        raise _Reading(parser, args)

    for name in READERS:
        setattr(argparse.ArgumentParser, name, stop)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(argparse.ArgumentParser, name, method)


if __name__ == "__main__":
    table = {program: options_of(parser_of(program)) for program in sys.argv[1:]}
    print(json.dumps(table, sort_keys=True))
