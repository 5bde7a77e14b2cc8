"""Parameter counts of the full-size model, to the unit (those of the released model)."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.parameter_count import count_parameters, meta_model


def test_full_size_counts() -> None:
    counts = count_parameters(RunConfig(stage="align"), False, ("M", "N"))
    assert counts["embedding"] == 131_086_336
    assert counts["embedding"] + counts["decoder"] == 1_340_180_480
    assert counts["vision_encoder"] == 303_179_776
    assert counts["resampler"] == 19_015_680
    assert counts["aligner_m"] == 225_461_760
    assert counts["aligner_n"] == 250_569_728
    assert counts["total"] == 1_662_375_936 + 476_031_488


def test_tied_head_and_vocabulary_padding_are_not_counted() -> None:
    without = count_parameters(RunConfig(stage="pretrain"), False, ())
    assert count_parameters(RunConfig(stage="pretrain"), True, ()) == without
    assert without["total"] == 1_662_375_936


def test_trainable_parameters_of_the_image_tower() -> None:
    model = meta_model(RunConfig(stage="pretrain"), True, ())
    modules = model.trainable_vision_modules()
    assert sum(p.numel() for module in modules for p in module.parameters()) == 12_598_272


@pytest.mark.parametrize(
    ("kind", "count_m", "count_n"),
    [
        # without the encoders: 12 layers of 7,095,552 and a final norm; N also without positions
        ("decoder_only", 225_461_760 - 85_148_160, 250_569_728 - 85_148_160 - 32768 * 768),
        ("none", 2048 * 768 + 768, 768 * 2048 + 2048),
    ],
)
def test_variants_of_the_aligner(kind: str, count_m: int, count_n: int) -> None:
    config = RunConfig(stage="align")
    aligner = dataclasses.replace(config.model.aligner, kind=kind)
    model = dataclasses.replace(config.model, aligner=aligner)
    counts = count_parameters(dataclasses.replace(config, model=model), False, ("M", "N"))
    assert (counts["aligner_m"], counts["aligner_n"]) == (count_m, count_n)
