"""Parameter counts of the full-size model, to the unit (those of the released model)."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.authors import authors_table
from megatron_kosmosg.models import layer_specs
from megatron_kosmosg.models.kosmosg import meta_model
from megatron_kosmosg.parallel.platform import transformer_flags

PARTS = ("embedding", "decoder", "vision_encoder", "resampler", "aligner_m", "aligner_n")


def count_parameters(
    config: RunConfig, output_head: bool, aligner_parts: tuple[str, ...]
) -> dict[str, int]:
    """Parameters of each part and, as "total", of all; without vocabulary padding.

    The tied output head adds nothing to the embedding.
    """
    model = meta_model(config, output_head, aligner_parts)
    counts = {}
    for part in PARTS:
        module = getattr(model, part)
        if module is not None:
            counts[part] = sum(parameter.numel() for parameter in module.parameters())
    rows, width = model.embedding.word_embeddings.weight.shape
    counts["embedding"] -= (rows - config.model.vocab_size) * width
    return counts | {"total": sum(counts.values())}


def test_full_size_counts() -> None:
    counts = count_parameters(RunConfig(stage="align"), False, ("M", "N"))
    assert counts["embedding"] == 131_086_336
    assert counts["embedding"] + counts["decoder"] == 1_340_180_480
    assert counts["vision_encoder"] == 303_179_776
    assert counts["resampler"] == 19_015_680
    assert counts["aligner_m"] == 225_461_760
    assert counts["aligner_n"] == 250_569_728
    assert counts["total"] == 1_662_375_936 + 476_031_488


def test_pieces_of_the_full_size_model() -> None:
    """Parameters of what the modules are made of."""
    model = meta_model(RunConfig(stage="align"), False, ("M", "N"))
    for name, count in {
        "decoder.layers.0": 50_378_752,
        "decoder.final_layernorm": 4_096,
        "aligner_m.positions": 25_165_824,
        "aligner_m.query": 59_136,
        "aligner_m.decoder": 113_515_008,
        "aligner_n.query": 25_165_824,
        "aligner_n.decoder": 113_515_008,
        "aligner_n.positions": 25_165_824,
    }.items():
        found = [
            p.numel() for path, p in model.named_parameters() if f"{path}.".startswith(f"{name}.")
        ]
        assert sum(found) == count, name
    encoder_m = [
        model.aligner_m.input_projection,
        model.aligner_m.positions,
        model.aligner_m.encoder,
    ]
    encoder_n = [
        model.aligner_n.output_projection,
        model.aligner_n.positions,
        model.aligner_n.encoder,
    ]
    assert _count(encoder_m) == 111_887_616
    assert _count(encoder_n) == 111_888_896
    assert len(model.decoder.layers) == 24


def test_a_model_that_is_only_counted_takes_the_local_layers(monkeypatch) -> None:
    """Also where TransformerEngine works: on the meta device its linears cannot be built."""

    class Taken(Exception):
        pass

    def take() -> None:
        raise Taken

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = "transformer_engine.pytorch"
    monkeypatch.setitem(sys.modules, engine, ModuleType(engine))
    monkeypatch.setattr(layer_specs, "transformer_engine_provider", take)
    for stage, with_head, parts in (("align", False, ("M", "N")), ("pretrain", True, ())):
        model = meta_model(RunConfig(stage=stage), with_head, parts)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not model.config.gradient_accumulation_fusion  # they would need apex's kernel
    with pytest.raises(Taken):
        layer_specs.provider()
    assert transformer_flags()["gradient_accumulation_fusion"]
    assert not transformer_flags(fuse_weight_gradients=False)["gradient_accumulation_fusion"]


def _count(modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_as_many_tensors_as_in_the_authors_files() -> None:
    """They list the tied head and two buffers besides: 486 of the language model."""
    config = RunConfig(stage="align")
    names = [name for name, _ in meta_model(config, False, ("M", "N")).named_parameters()]
    external = authors_table(config.model).external_names(names)
    found = {
        part: len([name for name in external if name.startswith(prefix)])
        for part, prefix in {
            "language model": "gpt_model.",
            "image tower": "img_model.",
            "connector": "img_connector.",
            "M": "aligner.encoder",
            "M and N": "aligner.",
        }.items()
    }
    assert found == {
        "language model": 486 - 3,
        "image tower": 391,
        "connector": 11,
        "M": 608,
        "M and N": 1216,
    }


def test_tied_head_and_vocabulary_padding_are_not_counted() -> None:
    without = count_parameters(RunConfig(stage="pretrain"), False, ())
    assert count_parameters(RunConfig(stage="pretrain"), True, ()) == without
    assert without["total"] == 1_662_375_936


def test_trainable_parameters_of_the_image_tower() -> None:
    model = meta_model(RunConfig(stage="pretrain"), True, ())
    assert _count(model.trainable_vision_modules()) == 12_598_272


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
