"""Initial weights (MAGNETO as the released code does it), the same model for every layout.

Every tensor is drawn whole, from a generator keyed by the seed and the parameter's full name, and
then cut to this rank's share: tensor- and pipeline-parallel sizes cannot change what is drawn.
Base: torch's default of Linear, uniform in +-1/sqrt(inputs) for weight and bias; MAGNETO's gain
multiplies weight and bias of the value, output and feed-forward projections, not query and key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn

from megatron_kosmosg.config.schema import ModelConfig
from megatron_kosmosg.data.random_keys import torch_generator
from megatron_kosmosg.models.lora import LORA_A, LORA_B
from megatron_kosmosg.models.positions import PADDING_INDEX
from megatron_kosmosg.parallel.context import ParallelContext

COLUMN_PARALLEL = ("linear_qkv", "linear_q", "linear_kv", "linear_fc1")
ROW_PARALLEL = ("linear_proj", "linear_fc2")
VOCABULARY_PARALLEL = ("word_embeddings", "output_layer")
_CLIP_STD = 0.02


def split_axis(name: str) -> int | None:
    """The axis of a parameter that tensor parallelism splits, by its name; None = replicated."""
    *_, module, leaf = name.split(".")
    if leaf == LORA_A:
        return 1 if module in ROW_PARALLEL else None
    if leaf == LORA_B:
        return 0 if module in COLUMN_PARALLEL else None
    if module in COLUMN_PARALLEL or module in VOCABULARY_PARALLEL or module == "sub_norm":
        return 0
    return 1 if module in ROW_PARALLEL and leaf == "weight" else None


def mark_tensor_parallel(model: nn.Module) -> None:
    """Tell Megatron's gradient norm which parameters are shares (it counts replicas once)."""
    for name, parameter in model.named_parameters():
        axis = split_axis(name)
        if axis is not None and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)


def magneto_gains(config: ModelConfig) -> dict[str, float]:
    """Gain of each stack of layers, by the prefix of its parameters' names.

    The decoder-only rule, the encoder-decoder rule (an encoder feeding a decoder of equal depth),
    and for N's encoder, which nothing attends to, the encoder-only rule.
    """
    depth = config.aligner.num_layers
    return {
        "decoder.": math.sqrt(math.log(2 * config.decoder.num_layers)),
        "aligner_m.encoder.": math.sqrt(math.log(3 * depth) * math.log(2 * depth) / 3),
        "aligner_m.decoder.": math.sqrt(math.log(3 * depth)),
        "aligner_n.decoder.": math.sqrt(math.log(3 * depth)),
        "aligner_n.encoder.": math.sqrt(math.log(2 * depth)),
    }


@torch.no_grad()
def initialise(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    context: ParallelContext,
    first_decoder_layer: int,
) -> None:
    """Fill all parameters of this rank's part of the model, except the tied output head's copy."""
    gains = magneto_gains(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf in ("weight", "bias")
    }
    for name, parameter in model.named_parameters():
        if name == "output_layer.weight":
            continue
        if name in norms:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        full_name = global_name(name, first_decoder_layer)
        generator = torch_generator(seed, "initialise", 0, full_name)
        axis = split_axis(name)
        shape = list(parameter.shape)
        if axis is not None:
            shape[axis] *= context.tp_size
        full = torch.empty(shape)
        _draw(full, name, shapes, gains, generator, config, context.tp_size)
        if axis is not None:
            full = full.chunk(context.tp_size, dim=axis)[context.tp_rank]
        parameter.copy_(full)


def global_name(name: str, first_decoder_layer: int) -> str:
    """A local parameter name with the decoder layer's number in the whole model."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first_decoder_layer)
    return ".".join(parts)


def _draw(
    full: torch.Tensor,
    name: str,
    shapes: Mapping[str, torch.Size],
    gains: Mapping[str, float],
    generator: torch.Generator,
    config: ModelConfig,
    tp_size: int,
) -> None:
    path, leaf = name.rpartition(".")[::2]
    module = path.rpartition(".")[2]
    if name == "embedding.word_embeddings.weight":
        rows = full[: config.vocab_size]
        rows.normal_(0, config.decoder.hidden_size**-0.5, generator=generator)
        full[config.vocab_size :] = 0
        full[PADDING_INDEX] = 0  # also the padding token's id, as in fairseq
    elif name.startswith("vision_encoder."):
        if leaf == "bias":
            full.zero_()
        else:
            full.normal_(0, _CLIP_STD, generator=generator)
    elif leaf == LORA_B:
        full.zero_()  # an adapter adds nothing until it has learnt something
    elif leaf == LORA_A:
        full.uniform_(-(full.shape[1] ** -0.5), full.shape[1] ** -0.5, generator=generator)
    elif leaf in ("query", "latent_query") or module == "positions":
        full.normal_(0, 1, generator=generator)
    else:
        inputs = shapes[f"{path}.weight"][1] * (tp_size if module in ROW_PARALLEL else 1)
        bound = inputs**-0.5
        if name.startswith("resampler.cross_attention."):
            bound = _xavier_bound(module, leaf, inputs, bound)
        full.uniform_(-bound, bound, generator=generator)
        _apply_gain(full, name, module, gains, config.decoder, config.aligner)


def _xavier_bound(module: str, leaf: str, inputs: int, default: float) -> float:
    """The resampler's attention: xavier-uniform, gain 1/sqrt(2) but for the output; its bias 0."""
    if module == "linear_proj":
        return math.sqrt(6 / (2 * inputs)) if leaf == "weight" else 0.0
    return math.sqrt(6 / (2 * inputs)) / math.sqrt(2) if leaf == "weight" else default


def _apply_gain(full, name, module, gains, decoder, aligner) -> None:
    gain = next((g for prefix, g in gains.items() if name.startswith(prefix)), None)
    if gain is None or "cross_attention" in name:
        return
    if module == "linear_qkv":
        heads = (decoder if name.startswith("decoder.") else aligner).num_attention_heads
        # Megatron keeps query, key and value rows of a head together.
        full.unflatten(0, (heads, 3, -1))[:, 2].mul_(gain)
    elif module in ("linear_proj", "linear_fc1", "linear_fc2"):
        full.mul_(gain)
