"""The authors' table at the released sizes, and which sizes an import may assume."""

from __future__ import annotations

import pytest
import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.conversion.authors import authors_table, has_fused_vision, stage_of
from megatron_kosmosg.conversion.checkpoint_writer import model_tensors
from megatron_kosmosg.conversion.openai_clip import clip_table
from megatron_kosmosg.conversion.sizes import head_counts
from megatron_kosmosg.conversion.tensors import InMemory, as_external

RELEASED = {
    "model.decoder.hidden_size": 2048,
    "model.vision.hidden_size": 1024,
    "model.aligner.hidden_size": 768,
}


@pytest.fixture(scope="module")
def native() -> InMemory:
    """Shapes of the released model with both halves of AlignerNet."""
    shapes = model_tensors(RunConfig(stage="align"))
    return InMemory({name: torch.empty(s, device="meta") for name, s in shapes.items()})


def test_the_released_files_have_as_many_keys(native: InMemory) -> None:
    names = as_external(authors_table(RunConfig(stage="align").model), native).names()
    counts = {
        # 486 in the file: two buffers and the tied head are not made from a weight of ours.
        "gpt_model.decoder.": 483,
        "img_model.visual.": 391,
        "img_connector.": 11,
        "aligner.encoder": 608,
        "aligner.": 1216,
    }
    for prefix, count in counts.items():
        assert sum(name.startswith(prefix) for name in names) == count, prefix
    shapes = {
        "gpt_model.decoder.embed_tokens.weight": (64007, 2048),
        "gpt_model.decoder.layers.23.ffn.ffn_layernorm.bias": (8192,),
        "gpt_model.decoder.layers.0.self_attn.k_proj.weight": (2048, 2048),
        "img_model.visual.conv1.weight": (1024, 3, 14, 14),
        "img_model.visual.positional_embedding": (257, 1024),
        "img_model.visual.transformer.resblocks.23.mlp.c_proj.weight": (1024, 4096),
        "img_connector.x_attn.v_proj.bias": (2048,),
        "aligner.encoder_proj.embed_tokens.weight": (768, 2048),
        "aligner.encoder.layers.11.encoder_attn.k_proj.weight": (768, 768),
        "aligner.decoder_query": (32768, 768),
        "aligner.decoder_proj.output_projection.weight": (2048, 768),
    }
    for name, shape in shapes.items():
        assert names[name].shape == shape, name


def test_clip_fuses_what_the_authors_separate(native: InMemory) -> None:
    tower = {n: native.read(n) for n in native.names() if n.startswith("vision_encoder.")}
    names = as_external(clip_table(), InMemory(tower)).names()
    assert names["visual.transformer.resblocks.5.attn.in_proj_weight"].shape == (3072, 1024)
    assert len(names) == 391 - 24 * 4


def test_the_stage_follows_from_the_parts() -> None:
    assert stage_of(["gpt_model.decoder.layer_norm.bias"]) == "pretrain"
    assert stage_of(["aligner.encoder_query", "aligner.decoder_query"]) == "align"
    assert stage_of(["aligner.encoder_query", "vae.vae.x"]) == "instruct"


def test_the_tower_that_the_model_uses_is_recognised() -> None:
    block = "img_model.visual.transformer.resblocks.0."
    fused, separate = f"{block}attn.in_proj_weight", f"{block}ts_attn.q_proj.weight"
    assert has_fused_vision([fused]) and not has_fused_vision([separate])
    assert not has_fused_vision([fused, separate])  # the first is then unused
    table = authors_table(RunConfig(stage="align").model)
    native, _ = table.external_recipe(separate)
    dropped = table.check([*table.external_names(native), fused], native)
    assert dropped == {"CLIP's own attention, replaced by ts_attn": [fused]}


def test_heads_are_assumed_for_the_released_widths_only() -> None:
    assert head_counts(RELEASED, "align", 32, set()) == {
        "model.decoder.num_attention_heads": 32,
        "model.vision.num_attention_heads": 16,
        "model.aligner.num_attention_heads": 12,
    }
    smaller = RELEASED | {"model.aligner.hidden_size": 384}
    with pytest.raises(ConversionError, match=r"aligner\.hidden_size=384.*num_attention_heads=N"):
        head_counts(smaller, "align", 32, set())
    assert "model.aligner.num_attention_heads" not in head_counts(smaller, "pretrain", 32, set())
    configured = {"model.aligner.num_attention_heads"}
    assert not configured & head_counts(smaller, "align", 32, configured).keys()
