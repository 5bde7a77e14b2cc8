"""The plain PyTorch aligner of an exported folder equals the one that is trained."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from megatron_kosmosg.conversion.hf_aligner import aligner_arguments, aligner_table
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner
from megatron_kosmosg.models.aligner import build_aligner_m
from megatron_kosmosg.parallel import platform
from tests.support.tiny_models import replace_section, tiny_config

LENGTHS = [11, 4, 7]


def exported_aligner(arguments: dict) -> KosmosGAligner:
    """With weights of its own everywhere, also in norms and biases."""
    torch.manual_seed(3)
    exported = KosmosGAligner(**arguments).eval()
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return exported


def copy_weights(exported: nn.Module, trained: nn.Module, aligner) -> None:
    """Every weight of the one is used for the other."""
    table, weights = aligner_table(aligner), exported.state_dict()
    native = {f"aligner_m.{name}": parameter for name, parameter in trained.named_parameters()}
    assert table.check(weights, native) == {}
    with torch.no_grad():
        for name, parameter in native.items():
            names, convert = table.native_recipe(name)
            parameter.copy_(convert([weights[n] for n in names]))


@pytest.mark.parametrize("kind", ["full", "decoder_only", "none"])
def test_the_same_condition(kind: str, tmp_path) -> None:
    config = tiny_config("instruct", tmp_path, tmp_path)
    aligner = dataclasses.replace(config.model.aligner, kind=kind)
    config = replace_section(config, "model", aligner=aligner)
    exported = exported_aligner(aligner_arguments(config))
    hidden = torch.randn(3, 11, config.model.decoder.hidden_size)
    padding_mask = torch.arange(11) >= torch.tensor(LENGTHS)[:, None]
    context = platform.initialize(config)
    try:
        trained = build_aligner_m(config, context.process_groups).eval()
        copy_weights(exported, trained, aligner)
        with torch.no_grad():
            expected, found = (m(hidden, padding_mask) for m in (trained, exported))
            alone = exported(hidden[1:2, :4], padding_mask[1:2, :4])
    finally:
        platform.teardown()
    assert found.shape == (3, aligner.num_queries, aligner.hidden_size)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(alone, found[1:2], rtol=0, atol=3e-6)


def test_a_prompt_beyond_the_position_table_is_refused() -> None:
    aligner = KosmosGAligner(
        input_size=8, hidden_size=8, ffn_hidden_size=8, num_layers=1, num_attention_heads=2,
        num_queries=3, max_positions=6,
    )  # fmt: skip
    assert aligner.longest_prompt == 4
    aligner(torch.zeros(1, 4, 8), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="5 positions.* has 4"):
        aligner(torch.zeros(1, 5, 8), torch.zeros(1, 5, dtype=torch.bool))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'half'.*decoder_only"):
        KosmosGAligner(kind="half")
