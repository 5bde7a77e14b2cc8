"""Optimizer states of gradients in several padded buckets are saved under the right parameters."""

from __future__ import annotations

import numpy as np

from megatron_kosmosg.checkpoint.save_and_resume import checkpoint_metadata
from megatron_kosmosg.checkpoint.weights import model_state
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.stages import build_stage
from megatron_kosmosg.training.optimizer import build_optimizer
from megatron_kosmosg.training.wrapping import wrap_model
from tests.support.ranks import run_ranks
from tests.support.shares import unwrap_model
from tests.support.tiny_models import tiny_config

MAIN = "optimizer.state.param."
OWN_BUCKETS = ("resampler.latent_query", "decoder.final_layernorm.bias")
"""Megatron-Core gives parameters with this mark, which tied embeddings have, their own bucket."""


def saved_main_parameters(config) -> tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """(elements of padding between buckets, {parameter: (its value, the saved fp32 one)})."""
    context = platform.initialize(config)
    try:
        bare = build_stage(config, context).build_model(context)
        named = dict(bare[0].named_parameters())
        for name in OWN_BUCKETS:
            named[name].shared_embedding = True
        chunks = wrap_model(bare, config)
        optimizer = build_optimizer(config, chunks)
        metadata = checkpoint_metadata(context)
        state = model_state(unwrap_model(chunks), metadata)["model0"]
        saved = optimizer.sharded_state_dict(state, is_loading=False, metadata=metadata)
        # All layers of the decoder have one key; the offset tells them apart.
        values = {(f"{MAIN}{entry.key}", entry.global_offset): entry for entry in state.values()}
        found = {
            str(place): (values[place].data.detach().numpy(), entry.data.numpy())
            for parameter in saved["param_state"].values()
            for entry in parameter.values()
            if (place := (entry.key, entry.global_offset)) in values
        }
        (buffer,) = chunks[0].buffers
        return buffer.numel - sum(p.numel() for p in buffer.params), found
    finally:
        platform.teardown()


def test_main_parameters_are_saved_as_they_are(tmp_path):
    config = tiny_config("pretrain", tmp_path, tmp_path)
    ((padding, found),) = run_ranks(1, saved_main_parameters, config)
    assert padding > 0, "without padding between buckets nothing can go wrong"
    assert len(found) > 20
    wrong = [key for key, (value, saved) in found.items() if not np.array_equal(value, saved)]
    assert not wrong
