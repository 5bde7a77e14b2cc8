"""The authors' tiny model (tests/golden) in our terms: its config, its weights, its names.

`Numbers` puts together what the ranks of a layout answered (golden_stages.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F

from megatron_kosmosg.config import schema
from megatron_kosmosg.conversion.authors import authors_table
from megatron_kosmosg.conversion.stored_names import EMBEDDING
from megatron_kosmosg.conversion.tensors import InMemory, as_native
from megatron_kosmosg.models.kosmosg import meta_model
from megatron_kosmosg.models.multimodal_lm import padded_vocab_size
from tests.support.shares import whole


def golden_config(
    golden: dict, stage: str, parallel: Mapping, num_rows: int = 3
) -> schema.RunConfig:
    """A run of the authors' tiny model, without dropout; num_rows: of a global batch, 3 or 6."""
    sizes = golden["sizes"]
    model = schema.ModelConfig(
        vocab_size=golden["vocab_size"],
        decoder=schema.DecoderConfig(
            num_layers=sizes["layers"],
            hidden_size=sizes["hidden"],
            ffn_hidden_size=sizes["ffn"],
            num_attention_heads=sizes["heads"],
            hidden_dropout=0.0,
        ),
        vision=schema.VisionConfig(
            num_layers=sizes["vis_layers"],
            hidden_size=sizes["vis_width"],
            ffn_hidden_size=4 * sizes["vis_width"],
            num_attention_heads=sizes["vis_heads"],
            image_size=sizes["image"],
            patch_size=sizes["patch"],
        ),
        # The released code gives the resampler as many heads as the decoder.
        resampler=schema.ResamplerConfig(
            num_latent_queries=sizes["latents"],
            num_attention_heads=sizes["heads"],
            attention_dropout=0.0,
        ),
        aligner=schema.AlignerConfig(
            num_layers=sizes["al_layers"],
            hidden_size=sizes["al_dim"],
            ffn_hidden_size=sizes["al_ffn"],
            num_attention_heads=sizes["al_heads"],
            num_queries=sizes["cond_tokens"],
            max_positions=sizes["max_pos"],
        ),
    )
    return schema.RunConfig(
        stage=stage,
        model=model,
        parallel=schema.ParallelConfig(timeout_seconds=60, **parallel),
        training=schema.TrainingConfig(
            micro_batch_size=3, global_batch_size=num_rows, seed=3, precision="fp32"
        ),
    )


def our_weights(golden: dict, config: schema.RunConfig) -> dict[str, torch.Tensor]:
    """The authors' weights under our names; each of theirs is used once or known to be unused."""
    table, external = authors_table(config.model), InMemory(golden["model"])
    whole_model = meta_model(config, True, ("M", "N"))
    names = [name for name, _ in whole_model.named_parameters()]
    table.check(golden["model"], names)
    native = as_native(table, external, names)
    weights = {name: native.read(name) for name in names}
    missing = padded_vocab_size(golden["vocab_size"], 1) - golden["vocab_size"]
    weights[EMBEDDING] = F.pad(weights[EMBEDDING], (0, 0, 0, missing))
    return weights


def under_their_names(
    golden: dict, config: schema.RunConfig, tensors: Mapping[str, np.ndarray], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Whole tensors (parameters or gradients) under the authors' `names`."""
    table = authors_table(config.model)
    native = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if EMBEDDING in native:
        native[EMBEDDING] = native[EMBEDDING][: golden["vocab_size"]]
    found = {}
    for name in names:
        sources, make = table.external_recipe(name)
        found[name] = make([native[source] for source in sources])
    return found


class Numbers:
    """The ranks' answers put together."""

    def __init__(self, golden: dict, config: schema.RunConfig, answers: list[dict]) -> None:
        self._golden, self._config, self._answers = golden, config, answers

    def output(self, part: str, key: str, micro_batch: int = 0) -> torch.Tensor:
        """An output or loss of the last pipeline stage; all its ranks must agree."""
        found = [answer[part][0] for answer in self._answers if answer[part][0]]
        first, *others = [torch.from_numpy(outputs[micro_batch][key]) for outputs in found]
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=1e-6 * float(first.abs().max()))
        return first

    def image_features(self) -> torch.Tensor:
        """Of the first pipeline stage's first rank."""
        return torch.from_numpy(self._answers[0]["image_features"])

    def gradients(self, part: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Whole gradients under the authors' names."""
        together = whole([answer[part][1] for answer in self._answers], tolerance=2e-6)
        return under_their_names(self._golden, self._config, together, names)


def errors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Largest absolute difference over the wanted tensor's largest entry, by name."""
    assert found.keys() == expected.keys()
    return {name: error(found[name], expected[name]) for name in expected}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the wanted tensor's largest entry."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())
