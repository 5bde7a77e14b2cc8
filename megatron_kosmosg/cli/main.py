"""`kosmosg COMMAND`: the table of commands, and the one that is asked for.

A command is a module with `build_parser()` and `main(arguments)`, which returns an exit code. It is
imported when it is asked for, and imports what is heavy after it has parsed its arguments.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import nearest, report_error, run_command
from megatron_kosmosg.launcher import as_typed


@dataclass(frozen=True)
class Command:
    """One command, which is one line of `kosmosg --help`."""

    name: str
    """One word, or two, the first of which several commands share."""
    module: str
    """Below megatron_kosmosg."""
    summary: str


SECTIONS: dict[str, tuple[Command, ...]] = {
    "data": (
        Command("preprocess", "cli.preprocess_data", "raw files -> a dataset that training reads"),
        Command("inspect", "cli.inspect_data", "what a dataset holds, as numbers and as a page"),
        Command("shards", "cli.dataset_shards", "many datasets as one: lists shards, checks each"),
        Command("cache-latents", "cli.cache_latents", "the VAE's latents of target images, once"),
        Command("build-data", "cli.build_instruct_data", "images -> captions, entities, masks"),
    ),
    "training": (
        Command("plan", "cli.plan", "memory, traffic and time of a layout, without its GPUs"),
        Command("doctor", "cli.doctor", "which kernels and versions a run here uses, and why"),
        Command("rehearse", "cli.rehearse", "an update of every kind of rank on fake GPUs"),
        Command("preflight", "cli.preflight", "whether the nodes of a job are fit"),
        Command("launch", "cli.launch", "a command on several ranks of this machine"),
        Command("train", "train", "one stage: pretrain, align or instruct"),
        Command("status", "cli.status", "how a run is: progress, time left, last error, disk"),
        Command("score-rank", "cli.score_rank", "a frozen U-Net that joins a run and leaves it"),
    ),
    "models": (
        Command("convert", "cli.convert_checkpoint", "other projects' checkpoints in, folders out"),
        Command("generate", "cli.generate", "images for prompts of text and images"),
        Command("demo", "cli.demo", "a page in the browser that draws prompts and captions"),
        Command("evaluate coco", "cli.evaluate_coco", "captions of val2014 as images: FID, CLIP-T"),
        Command("evaluate dreambench", "cli.evaluate_dreambench", "30 subjects in new scenes"),
        Command("evaluate pairs", "cli.evaluate_pairs", "any images: DINO, CLIP-I, CLIP-T, FID"),
        Command("evaluate toy", "toy.cli.evaluate_toy", "held-out prompts of the toy world"),
    ),
    "toy world": (
        Command("toy make-world", "toy.cli.make_toy_world", "its images and texts as files"),
        Command("toy make-dreambench", "toy.cli.make_toy_dreambench", "DreamBench with its shapes"),
        Command("toy make-report", "toy.cli.make_report", "the page of a quickstart"),
        Command("toy train-assets", "toy.cli.train_toy_assets", "its frozen image decoder anew"),
    ),
}
COMMANDS = {command.name: command for section in SECTIONS.values() for command in section}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command that the arguments name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    group, rest = "", words
    if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS):
        group, rest = f"{words[0]} ", words[1:]
    offered = [name for name in COMMANDS if name.startswith(group)]
    if not rest or rest[0] in ("-h", "--help"):
        if rest:
            return run_command(lambda: _show(offered, group))
        return _unknown(None, offered, group)
    if not group and rest[0] in ("-V", "--version"):
        return run_command(_show_versions)
    name = group + rest[0]
    if name not in COMMANDS:
        return _unknown(rest[0], offered, group)

    def work() -> int:
        module = importlib.import_module(f"megatron_kosmosg.{COMMANDS[name].module}")
        return module.main(rest[1:])

    return run_command(work)


def start() -> None:
    """Runs `kosmosg` or `python -m megatron_kosmosg`, and ends the process with the command's exit
    code."""
    exit_codes.leave(main())


def _show_versions() -> int:
    """Prints the versions of the package and of what runs depend on: Python decides which
    megatron-core is installed."""
    from megatron_kosmosg import __version__

    print(f"megatron-kosmosg {__version__}, Python {platform.python_version()}")
    for package in ("megatron-core", "torch"):
        print(f"{package} {importlib.metadata.version(package)}")
    return exit_codes.DONE


def _show(offered: list[str], group: str) -> int:
    typed = as_typed(group).strip()
    print(f"usage: {typed} COMMAND [OPTIONS]\n       {typed} COMMAND --help\n")
    width = max(len(name) for name in offered)
    for title, section in SECTIONS.items():
        shown = [command for command in section if command.name in offered]
        if shown:
            print(f"{title}:")
        for command in shown:
            print(f"  {command.name:{width}}  {command.summary}")
    if not group:
        print("\nThe first option may be --version. docs/running.md explains the exit codes:")
        print("0 done, 1 failure, 2 arguments or input, 3 thresholds, 85 start again, 130 Ctrl-C.")
    return exit_codes.DONE


def _unknown(word: str | None, offered: list[str], group: str) -> int:
    typed = as_typed(group).strip()
    names = [name.removeprefix(group) for name in offered]
    if word is None:
        return report_error(f"{typed} needs a command: {', '.join(names)}")
    near = nearest(word, names)
    advice = f"did you mean {group}{near}?" if near else f"{typed} --help lists them"
    return report_error(f"{typed} has no command {word}; {advice}")
