"""What the commands that score images have in common: their networks, and how they run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kosmosg import exit_codes
from megatron_kosmosg.command_line import CommandParser, file_path, positive_int
from megatron_kosmosg.terminal_text import printable_lines

if TYPE_CHECKING:
    from megatron_kosmosg.evaluation.feature_files import Group
    from megatron_kosmosg.evaluation.networks import Weights
    from megatron_kosmosg.evaluation.scoring import Scoring
    from megatron_kosmosg.launcher import RankInfo

FID_PROTOCOL_NAMES = ("kosmosg-first-run", "kosmosg-rerun", "metaquery", "clean-fid")
"""Of evaluation/preprocessing.py, which loads torch."""


def add_networks(parser: CommandParser, protocol: str | None = None) -> None:
    """Weight files; nothing is downloaded.

    Args:
        protocol: FID's, where no other is asked for; None leaves FID out.
    """
    group = parser.add_argument_group("networks", "files that you have; nothing is downloaded")
    group.add_argument(
        "--dino", type=file_path, metavar="FILE", help="dino_deitsmall16_pretrain.pth"
    )
    group.add_argument(
        "--clip", type=file_path, metavar="FOLDER", help="openai/clip-vit-base-patch32"
    )
    if protocol is None:
        return
    group.add_argument(
        "--inception",
        type=file_path,
        metavar="FILE",
        help="weights-inception-2015-12-05-6726825d.pth, also as pt_inception-...",
    )
    group.add_argument(
        "--fid-protocol",
        choices=FID_PROTOCOL_NAMES,
        default=protocol,
        help=f"what Inception sees ({protocol})",
    )


def add_scoring(parser: CommandParser) -> None:
    """Adds the options that say where the result goes, and on which device and how scores are
    computed."""
    parser.add_argument(
        "--output", type=file_path, required=True, metavar="FOLDER", help="for the result"
    )
    parser.add_argument(
        "--device", help="as torch names it (the rank's GPU if there is one, else the CPU)"
    )
    parser.add_argument(
        "--threads", type=positive_int, default=4, metavar="N", help="that read images (4)"
    )


def scoring_of(
    args: argparse.Namespace, groups: Sequence[Group], weights: Mapping[str, Weights]
) -> Scoring:
    """Raises ConfigError for a device or an output that cannot be used."""
    from megatron_kosmosg.config.errors import ConfigError
    from megatron_kosmosg.evaluation.scoring import Scoring
    from megatron_kosmosg.launcher import find_worker
    from megatron_kosmosg.parallel.devices import named_device

    if not groups:
        raise ConfigError(
            "these networks have nothing to compare: --clip scores texts and references, --dino "
            "references alone"
        )
    check_folder(args.output, "--output")
    rank_info = find_worker()
    device = named_device(args.device, rank_info)
    return Scoring(groups, weights, args.output, rank_info, device, args.threads)


def check_folder(folder: Path, option: str) -> None:
    """Raises ConfigError where a folder cannot be made because a file is in its way."""
    from megatron_kosmosg.config.errors import ConfigError

    place = folder.absolute()
    above = next(path for path in (place, *place.parents) if path.exists())
    if not above.is_dir():
        raise ConfigError(f"{option} {folder}: {above} is a file; give a folder")


def finish(written: tuple[Path, Path] | None, rank_info: RankInfo) -> int:
    """Says what was found, or that other ranks are at work; the exit code."""
    from megatron_kosmosg.evaluation.result import summary_lines
    from megatron_kosmosg.foreign_files import read_json

    if written is None:
        print(f"rank {rank_info.rank}: done; the rank that finishes last writes the result")
        return exit_codes.DONE
    result, page = written
    print(printable_lines("\n".join(summary_lines(read_json(result)))))
    print(f"{result}, {page}")
    return exit_codes.DONE
