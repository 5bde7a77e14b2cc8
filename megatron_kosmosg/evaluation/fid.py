"""FID of generated against real images under a named protocol, from feature files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.evaluation.feature_files import FeatureFiles, Group, ImageGroup
from megatron_kosmosg.evaluation.frechet import FeatureSums, Gaussian, frechet_distance
from megatron_kosmosg.evaluation.inception import WIDTH
from megatron_kosmosg.evaluation.networks import Weights
from megatron_kosmosg.evaluation.preprocessing import FID_PROTOCOLS
from megatron_kosmosg.files import replacing

GENERATED, REAL = "fid-generated", "fid-real"


def fid_groups(protocol: str, generated: Sequence[Path], real: Sequence[Path]) -> list[Group]:
    """The groups of images that Inception has to see; a side without images has none."""
    rules = FID_PROTOCOLS[protocol]
    groups = [
        ImageGroup(GENERATED, tuple(generated), {"inception": rules.generated}),
        ImageGroup(REAL, tuple(real), {"inception": rules.real}),
    ]
    return [group for group in groups if group.paths]


def gaussian_of(files: FeatureFiles, group: str) -> Gaussian:
    """Mean and covariance of the features of one side, read shard by shard."""
    sums = FeatureSums(WIDTH)
    for block in files.blocks(group, "inception"):
        sums.add(block)
    return sums.gaussian()


def recipe_of(protocol: str, inception: Weights, real: Sequence[Path]) -> dict[str, str]:
    """The values that the statistics of real images depend on."""
    names = hashlib.sha256("\n".join(path.name for path in real).encode()).hexdigest()
    return {
        "protocol": protocol,
        "inception": inception.sha256,
        "images": f"{len(real)}, names {names[:16]}",
    }


def write_gaussian(path: Path, real: Gaussian, recipe: dict[str, str]) -> None:
    """Statistics of real images with their recipe, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"recipe": json.dumps(recipe, sort_keys=True), "count": str(real.count)}
    with replacing(path) as temporary:
        save_file({"mean": real.mean, "covariance": real.covariance}, temporary, metadata)


def read_gaussian(path: Path, recipe: dict[str, str]) -> Gaussian:
    """The statistics that `write_gaussian` wrote. Raises InputError for another recipe, and for
    another file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found, count = json.loads(metadata["recipe"]), int(metadata["count"])
            real = Gaussian(file.get_tensor("mean"), file.get_tensor("covariance"), count)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"--real-statistics {path} does not hold statistics of real images ({error}); give "
            "another file to write them to"
        ) from error
    if found != recipe:
        changed = [name for name in recipe if found.get(name) != recipe[name]]
        raise InputError(
            f"--real-statistics {path} was made with another {changed[0]}; give another file"
        )
    return real


def fid_result(protocol: str, generated: Gaussian, real: Gaussian) -> dict[str, Any]:
    """The distance with what it depends on. Fewer images than dimensions bias it upwards."""
    return {
        "value": round(frechet_distance(generated, real), 4),
        "protocol": protocol,
        "n_generated": generated.count,
        "n_real": real.count,
        "is_biased": min(generated.count, real.count) <= WIDTH,
    }
