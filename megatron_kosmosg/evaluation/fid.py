"""FID of generated against real images under a named protocol, from feature files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_kosmosg.evaluation.feature_files import FeatureFiles, Group, ImageGroup
from megatron_kosmosg.evaluation.frechet import FeatureSums, Gaussian, frechet_distance
from megatron_kosmosg.evaluation.inception import WIDTH
from megatron_kosmosg.evaluation.preprocessing import FID_PROTOCOLS

GENERATED, REAL = "fid-generated", "fid-real"


def fid_groups(protocol: str, generated: Sequence[Path], real: Sequence[Path]) -> list[Group]:
    """What Inception has to see."""
    rules = FID_PROTOCOLS[protocol]
    return [
        ImageGroup(GENERATED, tuple(generated), {"inception": rules.generated}),
        ImageGroup(REAL, tuple(real), {"inception": rules.real}),
    ]


def gaussian_of(files: FeatureFiles, group: str) -> Gaussian:
    """Of one side, read shard by shard."""
    sums = FeatureSums(WIDTH)
    for block in files.blocks(group, "inception"):
        sums.add(block)
    return sums.gaussian()


def fid_result(protocol: str, generated: Gaussian, real: Gaussian) -> dict[str, Any]:
    """The distance with what it depends on. Fewer images than dimensions bias it upwards."""
    return {
        "value": round(frechet_distance(generated, real), 4),
        "protocol": protocol,
        "n_generated": generated.count,
        "n_real": real.count,
        "is_biased": min(generated.count, real.count) <= WIDTH,
    }
