"""What every command shares: its parser, the types of its options, and how an error ends it.

An error is one `error:` line on stderr and an exit code of exit_codes.py. An option that was called
otherwise once is still taken under its old name, with a note.

Long because it has the type of every option that two commands share: a few lines each, one place.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_kosmosg import exit_codes
from megatron_kosmosg.files import OF_THE_DISK
from megatron_kosmosg.launcher import as_typed, is_first_rank
from megatron_kosmosg.memory_errors import is_out_of_memory
from megatron_kosmosg.terminal_text import printable_lines

DTYPES = ("fp32", "bf16", "fp16")
MAX_SEED = 2**64 - 1
"""What torch's generators take."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command, and of each of its subcommands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.old_spellings: dict[str, str] = {}
        """Option as it was called -> as it is called now."""

    def renamed(self, old: str, new: str) -> None:
        """Takes `old` for the option `new`; --help does not show it."""
        self.old_spellings[old] = new

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return super().parse_known_args(self._in_new_spelling(args), namespace)

    def parse_known_intermixed_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        return super().parse_known_intermixed_args(self._in_new_spelling(args), namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2, because the arguments cannot be used."""
        advice = f"{self.prog} --help shows what can be given"
        wrong = message.removeprefix("unrecognized arguments: ")
        if wrong != message:
            advice = self._nearest(wrong.split()[0]) or advice
        sys.exit(report_error(f"{message}; {advice}"))

    def _in_new_spelling(self, args: Sequence[str] | None) -> list[str]:
        words = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if name in self.old_spellings:
                new = self.old_spellings[name]
                note(f"{name} is called {new} today")
                words[i] = new + equals + value
        return words

    def _nearest(self, wrong: str) -> str | None:
        near = nearest(wrong.partition("=")[0], self._option_string_actions)
        return None if near is None else f"did you mean {near}?"


def command_parser(name: str, description: str | None, epilog: str = "") -> CommandParser:
    """The parser of the command `kosmosg NAME`, under the name that the user typed."""
    return CommandParser(prog=as_typed(name), description=description, epilog=epilog)


def first_line(docstring: str | None) -> str | None:
    """The first line of a docstring; None where Python left docstrings out (`python -OO`)."""
    return docstring.splitlines()[0] if docstring else None


def nearest(wrong: str, names: Iterable[str]) -> str | None:
    """The one of `names` that was probably meant."""
    import difflib  # not needed where all is right

    return next(iter(difflib.get_close_matches(wrong, list(names), n=1)), None)


# ---- how a command ends --------------------------------------------------------------------------


def run_command(work: Callable[[], int], interrupted: str = "interrupted", writes: str = "") -> int:
    """The exit code of `work`, also where it raises for an input that cannot be used, a disk that
    cannot be written, or memory that does not suffice.

    Args:
        interrupted: what a user reads after Ctrl-C.
        writes: the option that says where the command writes; "" where it has none.
    """
    quieten_imports()
    try:
        return work()
    except BrokenPipeError:
        return exit_codes.of_a_reader_that_left()
    except ValueError as error:
        return report_error(str(error))
    except OSError as error:
        return report_error(_of_the_disk(error, writes))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return report_error(
            f"the memory does not suffice ({first_line(str(error))}); ask for less at once "
            "(smaller images or a smaller --batch-size where the command has them)"
        )
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return exit_codes.INTERRUPTED


def _of_the_disk(error: OSError, writes: str) -> str:
    """The error in words; of a disk that takes nothing more, where that is and what to do."""
    if error.errno not in OF_THE_DISK:
        return str(error)
    where, another = "", f"give another {writes}" if writes else "write elsewhere"
    if error.filename is None:
        where = f", in {writes or 'the output'} or for temporary files ($TMPDIR, else /tmp)"
    return f"{error}{where}; make room there, or {another}"


def quieten_imports() -> None:
    """Hides what libraries advise when they are imported: that torchvision, TransformerEngine and
    apex are not installed. None is needed, the first does harm beside a CPU torch, and `kosmosg
    doctor` says what a run uses."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")


def note(message: str) -> None:
    """Prints a message on stderr, on one rank only: all have the same arguments and settings."""
    if is_first_rank():
        print(f"note: {printable_lines(message)}", file=sys.stderr, flush=True)


def report_error(message: str, code: int = exit_codes.BAD_INPUT) -> int:
    """Says on stderr what is wrong, in one line where the message is not a list; the code."""
    print(f"error: {printable_lines(message)}", file=sys.stderr, flush=True)
    return code


# ---- types of options ----------------------------------------------------------------------------


def positive_int(text: str) -> int:
    return _whole(text, 1, None)


def natural_int(text: str) -> int:
    return _whole(text, 0, None)


def seed(text: str) -> int:
    return _whole(text, 0, MAX_SEED)


def positive_number(text: str) -> float:
    return _number(text, lambda value: value > 0, "a number above 0")


def number_from_zero(text: str) -> float:
    return _number(text, lambda value: value >= 0, "a number from 0 up")


def share(text: str) -> float:
    """A number between 0 and 1; the ends are refused, because nothing or everything would pass."""
    return _number(text, lambda value: 0 < value < 1, "a number between 0 and 1")


def some_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def file_path(text: str) -> Path:
    """A path that need not exist yet. An empty word is refused: it would be the current folder."""
    return Path(some_text(text))


def name_part(text: str) -> str:
    """Part of a file's name: letters, digits, `_`, `-` and, not at the beginning, points."""
    if not re.fullmatch(r"[\w-][\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be part of a file's name")
    return text


def existing_file(text: str) -> Path:
    if not Path(some_text(text)).is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return Path(text)


def existing_folder(text: str) -> Path:
    if not Path(some_text(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return Path(text)


def _whole(text: str, least: int, most: int | None) -> int:
    needed = f"a whole number from {least} " + ("up" if most is None else f"to {most}")
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not {needed}") from None
    if value < least or (most is not None and value > most):
        raise argparse.ArgumentTypeError(f"{text} is not {needed}")
    return value


def _number(text: str, fits: Callable[[float], bool], needed: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{text} is not {needed}")
    return value


# ---- options of several commands -----------------------------------------------------------------


def add_seed(parser: argparse._ActionsContainer, decides: str) -> None:
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help=f"{decides} (0)")


def add_dtype(
    parser: argparse._ActionsContainer, of: str, default: str | None = "fp32", shown: str = ""
) -> None:
    """Adds `--dtype`, the type of `of`. `shown` says in words what holds without the option."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default=default, help=f"of {of} ({shown or default})"
    )


def add_stable_diffusion(
    parser: argparse._ActionsContainer, use: str, required: bool = False
) -> None:
    parser.add_argument(
        "--stable-diffusion",
        type=file_path,
        required=required,
        metavar="FOLDER",
        help=f"Stable Diffusion in diffusers' form, {use}",
    )


def add_tokenizer_model(
    parser: argparse._ActionsContainer, default: str = "", required: bool = False
) -> None:
    parser.add_argument(
        "--tokenizer-model",
        type=existing_file,
        required=required,
        metavar="SPM",
        help="SentencePiece model file" + (f" ({default})" if default else ""),
    )


def add_config(parser: argparse._ActionsContainer, use: str = "", required: bool = False) -> None:
    """Adds `--config`. `use` says which of its settings the command takes; "" where it takes
    all."""
    text = "YAML file, or the name of a shipped config (toy_instruct, instruct_256gpu, ...)"
    parser.add_argument(
        "--config", required=required, metavar="CONFIG", help=f"{text}; {use}" if use else text
    )


def add_overrides(parser: argparse._ActionsContainer, use: str) -> None:
    # The default says that none need be given: argparse would call it required otherwise.
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=use)
