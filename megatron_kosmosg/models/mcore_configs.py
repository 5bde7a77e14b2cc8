"""Our settings as Megatron-Core's TransformerConfig, one function per stack of layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.pipeline_stage_specs import PipelineStageSpec
from megatron_kosmosg.parallel.platform import torch_dtype, transformer_flags

LAYERNORM_EPSILON = 1e-5
"""Of every stack; the decoder's is a setting."""


def decoder_config(config: RunConfig, specs: list[PipelineStageSpec]) -> TransformerConfig:
    """The language decoder, which alone is split over pipeline stages and along the sequence."""
    decoder, parallel = config.model.decoder, config.parallel
    return TransformerConfig(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.ffn_hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        hidden_dropout=decoder.hidden_dropout,
        attention_dropout=decoder.attention_dropout,
        layernorm_epsilon=decoder.layernorm_epsilon,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_megatron_layout(specs) if len(specs) > 1 else None,
        pipeline_dtype=torch_dtype(config.training.precision),
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths asks for; no experts here
        deallocate_pipeline_outputs=True,
        batch_p2p_sync=False,  # a host's wait that torch older than any tested here asked for
        calculate_per_token_loss=True,
        **_common(config),
    )


def resampler_config(config: RunConfig) -> TransformerConfig:
    """The one attention of the resampler, as wide as the decoder."""
    resampler = config.model.resampler
    return TransformerConfig(
        num_layers=1,
        hidden_size=config.model.decoder.hidden_size,
        num_attention_heads=resampler.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=resampler.attention_dropout,
        **_common(config),
    )


def aligner_config(config: RunConfig) -> TransformerConfig:
    """Each of AlignerNet's stacks; no dropout anywhere, as in the authors' code."""
    aligner = config.model.aligner
    return TransformerConfig(
        num_layers=aligner.num_layers,
        hidden_size=aligner.hidden_size,
        ffn_hidden_size=aligner.ffn_hidden_size,
        num_attention_heads=aligner.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=LAYERNORM_EPSILON,
        **_common(config),
    )


def _common(config: RunConfig) -> dict:
    precision = config.training.precision
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    return {
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        # Exact, by erf; torch computes it in float32 for half precision, too, and rounds once: a
        # float32 copy would give the same bits for three times the memory traffic.
        "activation_func": F.gelu,
        "add_bias_linear": True,
        "normalization": "LayerNorm",
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "params_dtype": torch.float32,  # training/wrapping.py casts
        # Parameters are allocated on torch's default device and filled by initialise.py.
        "use_cpu_initialization": True,
        "perform_initialization": False,
        # Told which micro-batch is the first, TransformerEngine's linears would write over their
        # sums of weight gradients there, which is right only for a module that runs once in it.
        "disable_parameter_transpose_cache": True,
        **recompute[config.training.recompute],
        **transformer_flags(config.performance.gradient_accumulation_fusion),
    }


def _megatron_layout(specs: list[PipelineStageSpec]) -> list[list[str]]:
    layout = [["decoder"] * spec.num_decoder_layers for spec in specs]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout
