"""Joins a training run as a frozen U-Net rank, from any job, and works until told to stop.

The run has to train instruct with score.placement=dedicated; its folder says where it listens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import (
    CommandParser,
    command_parser,
    existing_folder,
    note,
    number_from_zero,
    report_error,
    run_command,
)

if TYPE_CHECKING:
    from megatron_kosmosg.config.schema import RunConfig
    from megatron_kosmosg.score.run_file import RunAddress

EPILOG = """\
It loads the run's U-Net and VAE, proves that they and the target data are those of the run's own
score ranks, and answers requests. TERM, USR1 or Ctrl-C lets it go: its requests go to others. When
the run stops or fails it waits for the next start of it.

exit codes: 0 the run is done; 85 a signal asked to stop; 1 no start of the run within --wait;
2 arguments, or the run refuses this rank.

examples:
  kosmosg score-rank --run runs/instruct
  kosmosg launch --ranks 8 score-rank --run runs/instruct
"""
_LOOK_SECONDS = 1.0


def build_parser() -> CommandParser:
    """The parser of the command and its options."""
    parser = command_parser("score-rank", __doc__, EPILOG)
    parser.add_argument(
        "--run", type=existing_folder, required=True, metavar="FOLDER", help="the run's folder"
    )
    parser.add_argument(
        "--wait",
        type=number_from_zero,
        default=600.0,
        metavar="SECONDS",
        help="for a start of the run (600)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Works until told to stop, and returns the exit code that the command's help explains."""
    args = build_parser().parse_args(arguments)
    return run_command(lambda: _join(args))


def _join(args: argparse.Namespace) -> int:
    from megatron_kosmosg.launcher import find_rank_info
    from megatron_kosmosg.parallel.devices import choose_device
    from megatron_kosmosg.score.connect import join_as_guest
    from megatron_kosmosg.score.member import DecoderLost, KeyIsOld, NotAdmitted
    from megatron_kosmosg.score.rank import run_score_rank

    _check_run(args.run)
    device = choose_device(find_rank_info())
    joined: set[str] = set()
    while True:
        found = _next_start(args.run, joined, args.wait)
        if found is None:
            return report_error(f"{args.run}: no start of the run to join", exit_codes.FAILURE)
        address, config = found
        joined.add(address.start)
        rank = join_as_guest(config, address, device)
        try:
            finished = run_score_rank(config, rank)
        except (DecoderLost, KeyIsOld) as error:
            note(f"{error}; waiting for the next start of the run")
            continue
        except NotAdmitted as error:
            return report_error(f"{args.run}: the run refuses this rank: {error}")
        if finished:
            return exit_codes.DONE
        if rank.membership.end is None:
            return exit_codes.STOPPED
        note("the run was stopped; waiting for the next start of it")


def _check_run(folder: Path) -> None:
    """Raises ConfigError where no run that has score ranks was ever started."""
    from megatron_kosmosg.checkpoint.folder import CONFIG_FILE
    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.config.load import load_config
    from megatron_kosmosg.config.rank_grid import has_score_ranks

    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"--run {folder} is no run's folder (it has no {CONFIG_FILE}); start the run first"
        )
    config = load_config(folder / CONFIG_FILE, [])
    if not has_score_ranks(config):
        raise ConfigError(
            f"--run {folder}: this run has no score ranks (stage={config.stage}, "
            f"score.placement={config.score.placement}); start it with stage instruct and "
            "score.placement=dedicated"
        )


def _next_start(
    folder: Path, joined: set[str], seconds: float
) -> tuple[RunAddress, RunConfig] | None:
    """A start of the run that this process has not joined yet, and its config; None: there was
    none for so long."""
    from megatron_kosmosg.checkpoint.folder import CONFIG_FILE
    from megatron_kosmosg.config.load import load_config
    from megatron_kosmosg.score.run_file import config_hash, find

    deadline, path = time.monotonic() + seconds, folder / CONFIG_FILE
    while True:
        address = find(folder)
        # A start tells its address before it has written its config.
        if address is not None and address.start not in joined and path.is_file():
            if config_hash(path.read_text(encoding="utf-8")) == address.config:
                return address, load_config(path, [])
        if time.monotonic() > deadline:
            return None
        time.sleep(_LOOK_SECONDS)
