"""Where the released code drops in training: counted at the calls that drop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_kosmosg.config.schema import DecoderConfig, ResamplerConfig, RunConfig
from megatron_kosmosg.inference.trained_model import single_process
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.stages.align import AlignStage
from tests.support.tiny_models import (
    model_config,
    random_batch,
    tiny_config,
    write_stable_diffusion,
)

ROWS, LENGTH = 2, 13


def with_dropout(config: RunConfig, **decoder) -> RunConfig:
    """The config with the authors' dropout in place of the tests' none."""
    model = config.model
    model = dataclasses.replace(
        model,
        decoder=dataclasses.replace(
            model.decoder, **{"hidden_dropout": DecoderConfig().hidden_dropout} | decoder
        ),
        resampler=dataclasses.replace(
            model.resampler, attention_dropout=ResamplerConfig().attention_dropout
        ),
    )
    return dataclasses.replace(config, model=model)


@pytest.fixture
def drops(monkeypatch) -> list[tuple[str, tuple[int, ...], float]]:
    """(kind, shape, probability) of every dropout that drops something."""
    found = []
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def counting_dropout(x, p=0.5, training=True, inplace=False):
        if training and p > 0:
            found.append(("dropout", tuple(x.shape), p))
        return dropout(x, p, training, inplace)

    def counting_attention(query, *args, dropout_p=0.0, **kwargs):
        if dropout_p > 0:
            found.append(("attention", tuple(query.shape), dropout_p))
        return attention(query, *args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "dropout", counting_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counting_attention)
    return found


def forward(config: RunConfig, training: bool, drops: list) -> None:
    """One forward of the whole model; what dropped before it is forgotten."""
    with single_process(config) as context:
        model = KosmosG(config, context, output_head=True, aligner_parts=("M", "N")).train(training)
        batch = random_batch("pretrain", ROWS, LENGTH, seed=0)
        drops.clear()
        model(batch["tokens"], batch["image_mask"], batch["padding_mask"], batch["pixel_values"])


def test_defaults_are_the_authors_effective_behaviour() -> None:
    """Their attention dropout of 0.1 is never applied in the decoder, but is in the resampler."""
    assert DecoderConfig().hidden_dropout == 0.1 and DecoderConfig().attention_dropout == 0.0
    assert ResamplerConfig().attention_dropout == 0.1


def test_one_dropout_after_the_embedding_and_two_in_each_decoder_layer(drops) -> None:
    """Nothing drops after the decoder, in AlignerNet or in the image tower."""
    forward(
        with_dropout(RunConfig(stage="pretrain", model=model_config())), training=True, drops=drops
    )
    sizes = model_config()
    hidden = ("dropout", (LENGTH, ROWS, sizes.decoder.hidden_size), 0.1)
    assert [d for d in drops if d[0] == "dropout"] == [hidden] * (1 + 2 * sizes.decoder.num_layers)
    (resampler,) = (d for d in drops if d[0] == "attention")
    assert resampler[1][2] == sizes.resampler.num_latent_queries and resampler[2] == 0.1


def test_attention_dropout_of_the_decoder_is_a_setting(drops) -> None:
    config = with_dropout(RunConfig(stage="pretrain", model=model_config()), attention_dropout=0.2)
    forward(config, training=True, drops=drops)
    layers = [d for d in drops if d[0] == "attention" and d[2] == 0.2]
    assert len(layers) == config.model.decoder.num_layers
    assert all(shape[2] == LENGTH for _, shape, _ in layers)


def test_nothing_drops_in_evaluation(drops) -> None:
    forward(
        with_dropout(RunConfig(stage="pretrain", model=model_config())), training=False, drops=drops
    )
    assert not drops


def test_frozen_decoder_of_align_drops_in_training(tmp_path) -> None:
    """Its noisy states are both what M reads and what N has to rebuild, as in the released code."""
    folder = write_stable_diffusion(tmp_path)
    config = with_dropout(tiny_config("align", folder, tmp_path))
    batch = random_batch("align", ROWS, LENGTH, seed=0)
    with single_process(config) as context:
        stage = AlignStage(config, context)
        (model,) = stage.build_model(context)
        losses = {}
        for training in (True, False):
            model.train(training)
            outputs, reports = [], []
            for _ in range(2):
                output, loss_func = stage.forward_step(iter([batch]), model)
                outputs.append(output)
                reports.append(loss_func(output)[2])
            losses[training] = outputs, reports
    (first, second), reports = losses[True]
    assert not torch.equal(first["hidden"], second["hidden"])
    assert not torch.equal(first["condition"], second["condition"])
    assert not first["hidden"].requires_grad and first["condition"].requires_grad
    error = (first["reconstruction"] - first["hidden"]).square().mean(dim=(1, 2)).sum()
    scale = first["condition"].shape[1] / LENGTH
    torch.testing.assert_close(reports[0]["reconstruction_loss"][0], scale * error.detach())
    (first, second), _ = losses[False]
    assert torch.equal(first["hidden"], second["hidden"])
