"""Every parameter starts as the released code starts it: distribution, scale and MAGNETO's gain.

tests/distributed/test_weights.py shows that layouts change nothing about it.
"""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from megatron_kosmosg.config.schema import ModelConfig, RunConfig
from megatron_kosmosg.models.initialise import magneto_gains
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.context import single_process_context
from tests.support.tiny_models import model_config

WIDTH, FFN, HEADS, DEPTH = 64, 96, 4, 3
"""Of the decoder and of AlignerNet here."""
FULL_SIZE_GAINS = {
    "decoder.": 1.967537,
    "aligner_m.encoder.": 1.948385,
    "aligner_m.decoder.": 1.893018,
    "aligner_n.decoder.": 1.893018,
    "aligner_n.encoder.": 1.782710,
}
LOG = math.log
GAINS = {
    "decoder": LOG(2 * DEPTH) ** 0.5,
    "aligner_m.encoder": (LOG(3 * DEPTH) * LOG(2 * DEPTH) / 3) ** 0.5,
    "aligner_m.decoder": LOG(3 * DEPTH) ** 0.5,
    "aligner_n.decoder": LOG(3 * DEPTH) ** 0.5,
    "aligner_n.encoder": LOG(2 * DEPTH) ** 0.5,
}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Initial parameters; query, key and value rows of fused projections apart, as `name.q`."""
    platform.prepare_megatron(torch.device("cpu"))
    model = model_config()
    sizes = {"hidden_size": WIDTH, "ffn_hidden_size": FFN, "num_attention_heads": HEADS}
    model = dataclasses.replace(
        model,
        decoder=dataclasses.replace(model.decoder, **sizes),
        aligner=dataclasses.replace(model.aligner, **sizes),
    )
    config = RunConfig(stage="pretrain", model=model)
    built = KosmosG(
        config, single_process_context("cpu"), output_head=True, aligner_parts=("M", "N")
    )
    return dict(_apart({name: p.detach() for name, p in built.named_parameters()}))


def _apart(parameters: dict[str, torch.Tensor]):
    for name, value in parameters.items():
        fused = re.search(r"linear_(q?kv)\.", name)
        if fused is None:
            yield name, value
            continue
        parts = fused.group(1)
        rows = value.unflatten(0, (HEADS, len(parts), -1))
        for index, part in enumerate(parts):
            yield name.replace(fused.group(0), f"linear_{part}."), rows[:, index].flatten(0, 1)


def expected(name: str) -> tuple[str, float]:
    """(distribution, its scale) of a parameter, by the released code's rules."""
    leaf = name.rpartition(".")[2]
    if "norm" in name:
        return "constant", 1.0 if leaf == "weight" else 0.0
    if name == "embedding.word_embeddings.weight":
        return "normal", WIDTH**-0.5
    if leaf in ("query", "latent_query") or ".positions." in name:
        return "normal", 1.0
    if name.startswith("resampler.cross_attention."):
        xavier = math.sqrt(6 / (WIDTH + WIDTH))
        if "linear_proj" in name:
            return ("uniform", xavier) if leaf == "weight" else ("constant", 0.0)
        return "uniform", xavier / math.sqrt(2) if leaf == "weight" else WIDTH**-0.5
    if name == "resampler.dense.weight" or name == "resampler.dense.bias":
        return "uniform", model_config().vision.hidden_size ** -0.5
    inputs = FFN if "linear_fc2" in name else WIDTH
    return "uniform", inputs**-0.5 * _gain(name)


def _gain(name: str) -> float:
    scaled = re.search(r"linear_(v|proj|fc1|fc2)\.", name)
    if scaled is None or "cross_attention" in name:
        return 1.0
    return next(gain for stack, gain in GAINS.items() if name.startswith(stack + "."))


def test_gains_of_the_full_size_model() -> None:
    gains = magneto_gains(ModelConfig())
    assert gains == pytest.approx(FULL_SIZE_GAINS, abs=1e-6)


def test_every_parameter_has_its_distribution(weights) -> None:
    """One group per kind of parameter over all layers, scaled by what is expected of it: the
    empirical distribution is the uniform or normal one, and the largest entry reaches the bound.
    """
    groups: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, value in weights.items():
        if name.startswith("vision_encoder."):  # the tower is loaded, not trained from scratch
            continue
        if name == "embedding.word_embeddings.weight":
            vocabulary = model_config().vocab_size
            assert not value[1].any() and not value[vocabulary:].any()
            value = value[[i for i in range(vocabulary) if i != 1]]
        kind, scale = expected(name)
        if kind == "constant":
            assert torch.all(value == scale), name
            continue
        group = re.sub(r"layers\.\d+\.", "", name)
        groups.setdefault((group, kind), []).append((value.double() / scale).flatten())
    assert len(groups) > 70
    for (group, kind), values in groups.items():
        drawn = torch.cat(values)
        assert _distance(drawn, kind) < 2.2 / len(drawn) ** 0.5, group  # chance: 1 in 8000
        if kind == "uniform":
            assert 1 - 10 / len(drawn) < drawn.abs().max() <= 1 + 1e-6, group
        else:
            assert drawn.std() == pytest.approx(1, abs=4 / (2 * len(drawn)) ** 0.5), group


def _distance(drawn: torch.Tensor, kind: str) -> float:
    """Kolmogorov-Smirnov statistic against uniform(-1, 1) or the standard normal."""
    ordered = drawn.sort().values
    wanted = (ordered + 1) / 2 if kind == "uniform" else (1 + torch.erf(ordered / 2**0.5)) / 2
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(
        torch.maximum((steps - wanted).abs(), (steps - 1 / len(steps) - wanted).abs()).max()
    )


def test_layers_and_stacks_differ(weights) -> None:
    first, second = (weights[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    m, n = (weights[f"aligner_{part}.decoder.layers.0.mlp.linear_fc1.weight"] for part in "mn")
    assert not torch.equal(m, n)
