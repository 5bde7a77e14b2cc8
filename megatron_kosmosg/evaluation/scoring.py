"""Scores items: all ranks compute features, and whoever finds these whole writes the two files of
the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_kosmosg.evaluation.feature_files import FeatureFiles, Group
from megatron_kosmosg.evaluation.networks import (
    Weights,
    find_clip,
    find_dino,
    find_inception,
    open_network,
)
from megatron_kosmosg.evaluation.result import Evaluation, write_evaluation
from megatron_kosmosg.launcher import RankInfo
from megatron_kosmosg.progress import Progress

FEATURES = "features"
"""Folder of them below the output."""


@dataclass(frozen=True)
class Scoring:
    """The items that one rank scores, and the networks it scores them with."""

    groups: Sequence[Group]
    weights: Mapping[str, Weights]
    output: Path
    rank_info: RankInfo
    device: torch.device
    threads: int


def find_networks(
    dino: Path | None = None, clip: Path | None = None, inception: Path | None = None
) -> dict[str, Weights]:
    """The weights of the networks whose files were given, by network. Raises ConfigError for a file
    that is not there."""
    finders = {"dino": (find_dino, dino), "clip": (find_clip, clip)}
    finders["inception"] = (find_inception, inception)
    return {name: find(path) for name, (find, path) in finders.items() if path is not None}


def check_networks(weights: Mapping[str, Weights]) -> None:
    """Opens each once, before hours go into images. Raises ConfigError for what cannot be used."""
    for found in weights.values():
        open_network(found, torch.device("cpu"))


def score(scoring: Scoring) -> FeatureFiles:
    """Computes this rank's share of the features; what is there already stays. Raises InputError
    for a file that is no image, and ConfigError for weights of another network."""
    files = features_of(scoring)
    with Progress("score", "image", is_shown=scoring.rank_info.rank == 0) as progress:
        files.extract(scoring.rank_info, scoring.device, scoring.threads, progress)
    return files


def features_of(scoring: Scoring) -> FeatureFiles:
    """The feature files of a scoring, as far as they are written now."""
    return FeatureFiles(scoring.output / FEATURES, scoring.groups, scoring.weights)


def report(
    scoring: Scoring, evaluate: Callable[[FeatureFiles], Evaluation]
) -> tuple[Path, Path] | None:
    """Writes the JSON file and the page of an evaluation, and returns their paths.

    None where another rank has not finished, which then writes them. Two ranks that finish together
    write the same bytes."""
    files = features_of(scoring)
    return write_evaluation(scoring.output, evaluate(files)) if files.is_complete() else None
