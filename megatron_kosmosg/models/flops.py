"""FLOPs of one optimizer update, from the sizes in the config and the work in the batch.

A multiply-add counts 2, attention is counted as full matrices, and recomputation, norms,
activations and the optimizer are left out. A trained stack costs three times its forward pass
(outputs, input gradients, weight gradients), a frozen one once, and twice where a gradient passes
through it. Used while training, so it imports nothing but the config and `diffusion_flops`.
"""

from __future__ import annotations

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusion_flops import clip_text_shape, score_flops

TRAINED, PASSED_THROUGH = 3, 2


def pretrain_flops(config: RunConfig, num_tokens: int, num_images: int) -> float:
    """FLOPs of one update on `num_tokens` packed positions with `num_images` images in them."""
    rows = num_tokens / config.data.seq_length
    language = decoder_flops(config, num_tokens, rows) + head_flops(config, num_tokens)
    return TRAINED * language + _images(config, num_images)


def align_flops(config: RunConfig, num_tokens: int, num_captions: int) -> float:
    """FLOPs of one update on `num_captions` captions, `num_tokens` positions with padding."""
    trained = aligner_m_flops(config, num_tokens, num_captions) + aligner_n_flops(
        config, num_tokens, num_captions
    )
    frozen = decoder_flops(config, num_tokens, num_captions) + clip_text_flops(config, num_captions)
    return TRAINED * trained + frozen


def instruct_flops(config: RunConfig, num_tokens: int, num_images: int, num_targets: int) -> float:
    """FLOPs of one update: `num_targets` prompts, `num_images` images in them, `num_tokens`
    positions with padding. The null condition's row is left out."""
    adapters = adapter_flops(config, num_tokens)
    language = updates(config, "decoder") * decoder_flops(config, num_tokens, num_targets)
    aligner = updates(config, "aligner_m") * aligner_m_flops(config, num_tokens, num_targets)
    score = score_flops(
        config.model.diffusion.path,
        config.data.target_image_size,
        config.model.aligner.num_queries,
        with_vae=config.data.latent_cache is None,
    )
    trained = language + TRAINED * adapters + aligner + _images(config, num_images)
    return trained + num_targets * score


def updates(config: RunConfig, part: str) -> int:
    """How many forward passes of a part of the model an update takes as FLOPs. Only adapters
    (`lora`) leave parts frozen that gradients pass through, and parts that none reaches.

    Args:
        part: name in the model of a part that trains in `pretrain` and `instruct`.
    """
    lora = config.lora
    if not lora.rank or part in lora.trains:
        return TRAINED
    reached = part in ("decoder", "aligner_m")
    reached = reached or (part == "resampler" and "vision_encoder" in lora.trains)
    return PASSED_THROUGH if reached else 1


def adapter_flops(config: RunConfig, num_tokens: float) -> float:
    """Forward pass of the decoder's low-rank adapters; 0 without any."""
    sizes, rank = config.model.decoder, config.lora.rank
    inputs_and_outputs = 8 * sizes.hidden_size + 2 * sizes.ffn_hidden_size  # of its four linears
    return 2 * num_tokens * sizes.num_layers * rank * inputs_and_outputs


def decoder_flops(config: RunConfig, num_tokens: float, num_rows: float) -> float:
    """Forward pass of the language decoder over rows of equal length, without the head."""
    sizes = config.model.decoder
    return sizes.num_layers * _layer(
        sizes.hidden_size, sizes.ffn_hidden_size, num_tokens, num_tokens / max(num_rows, 1e-9)
    )


def head_flops(config: RunConfig, num_tokens: float) -> float:
    """FLOPs of a forward pass of the output head."""
    return 2 * num_tokens * config.model.decoder.hidden_size * config.model.vocab_size


def vision_flops(config: RunConfig, num_images: float) -> float:
    """FLOPs of a forward pass of the image tower."""
    sizes = config.model.vision
    patch = 2 * 3 * sizes.patch_size**2 * sizes.hidden_size
    return num_images * (patch * (_patches(config) - 1) + sizes.num_layers * _vision_block(config))


def trained_vision_flops(config: RunConfig, num_images: float) -> float:
    """Forward pass of the image tower's trained blocks."""
    return num_images * config.model.vision.num_trainable_layers * _vision_block(config)


def resampler_flops(config: RunConfig, num_images: float) -> float:
    """Forward pass of the resampler: projection, then queries attending to patches and queries."""
    width, queries = config.model.decoder.hidden_size, config.model.resampler.num_latent_queries
    patches = _patches(config)
    keys = patches + queries
    projection = 2 * patches * config.model.vision.hidden_size * width
    linears = 2 * width**2 * (2 * queries + 2 * keys)
    return num_images * (projection + linears + 4 * queries * keys * width)


def aligner_m_flops(config: RunConfig, num_tokens: float, num_rows: float) -> float:
    """Forward pass of AlignerNet M over rows of equal length."""
    length = num_tokens / max(num_rows, 1e-9)
    return _aligner_half(
        config, num_tokens, num_rows, length, queries=config.model.aligner.num_queries, keys=length
    )


def aligner_n_flops(config: RunConfig, num_tokens: float, num_rows: float) -> float:
    """Forward pass of AlignerNet N, back to the decoder's space."""
    length = num_tokens / max(num_rows, 1e-9)
    return _aligner_half(
        config, num_tokens, num_rows, length, queries=length, keys=config.model.aligner.num_queries
    )


def _aligner_half(
    config: RunConfig,
    num_tokens: float,
    num_rows: float,
    length: float,
    *,
    queries: float,
    keys: float,
) -> float:
    """M or N: one linear map, an encoder over the prompt, queries that cross-attend to keys."""
    sizes, width = config.model.aligner, config.model.decoder.hidden_size
    projection = 2 * num_tokens * width * sizes.hidden_size
    if sizes.kind == "none":
        return projection
    encoder = sizes.num_layers * _layer(
        sizes.hidden_size, sizes.ffn_hidden_size, num_tokens, length
    )
    decoder = num_rows * _cross_stack(config, queries=queries, keys=keys)
    return projection + decoder + (encoder if sizes.kind == "full" else 0.0)


def clip_text_flops(config: RunConfig, num_captions: float) -> float:
    """Forward pass of the frozen text encoder of `align`."""
    shape = clip_text_shape(config.model.clip_text.path)
    tokens = shape.positions
    return num_captions * shape.num_layers * _layer(shape.width, shape.ffn_width, tokens, tokens)


def _images(config: RunConfig, num_images: float) -> float:
    """Image tower with its last blocks trained, and the resampler, where they train."""
    trained = updates(config, "vision_encoder") - 1
    return (
        vision_flops(config, num_images)
        + trained * trained_vision_flops(config, num_images)
        + updates(config, "resampler") * resampler_flops(config, num_images)
    )


def _patches(config: RunConfig) -> int:
    """Positions of one image in the image tower, class token included."""
    return (config.model.vision.image_size // config.model.vision.patch_size) ** 2 + 1


def _vision_block(config: RunConfig) -> float:
    sizes, patches = config.model.vision, _patches(config)
    return _layer(sizes.hidden_size, sizes.ffn_hidden_size, patches, patches)


def _layer(width: int, ffn_width: int, num_tokens: float, length: float) -> float:
    """FLOPs of one transformer layer over `num_tokens` positions in rows of `length`."""
    linears = 2 * num_tokens * (4 * width**2 + 2 * width * ffn_width)
    return linears + 4 * num_tokens * length * width


def _cross_stack(config: RunConfig, queries: float, keys: float) -> float:
    """FLOPs of one row through a cross-attention stack of AlignerNet."""
    sizes = config.model.aligner
    self_attention_and_ffn = _layer(sizes.hidden_size, sizes.ffn_hidden_size, queries, queries)
    cross = 2 * sizes.hidden_size**2 * (2 * queries + 2 * keys)
    cross += 4 * queries * keys * sizes.hidden_size
    return sizes.num_layers * (self_attention_and_ffn + cross)
