"""Checks across settings, before a process group or a GPU is touched.

Only numbers are looked at, so plans for other machines are checked, too; `needed_files.py` looks at
this one's file system. Whoever calls hands in the facts of the stage (`stages.stage_facts`).
Longer than usual because it is a list: each check is a few lines and stands alone.
"""

from __future__ import annotations

import math

from megatron_kosmosg.config.batching import data_parallel_size, num_microbatches
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.rank_grid import divisors, neighbours
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.stage_facts import StageFacts

_WIDEST_WINDOW = 16


def validate_layout(config: RunConfig, world_size: int, facts: StageFacts) -> None:
    """Raises ConfigError if sizes, batch and schedule do not fit `world_size` ranks."""
    _check_numbers(config)
    _check_world_size(config, world_size)
    _check_tensor_parallel(config, facts)
    _check_pipeline(config)
    _check_overlap(config)
    _check_optimizer_states(config)
    _check_score(config)
    _check_grid(config, facts)
    _check_packing(config, facts)
    _check_performance(config)
    _check_lora(config, facts)
    _check_schedule(config)
    _check_microbatches(config, data_parallel_size(config, world_size))


def _check_numbers(config: RunConfig) -> None:
    at_least_one = {
        "parallel.tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "parallel.pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "parallel.timeout_seconds": config.parallel.timeout_seconds,
        "parallel.stall_seconds": config.parallel.stall_seconds,
        "training.train_iters": config.training.train_iters,
        "training.micro_batch_size": config.training.micro_batch_size,
        "training.global_batch_size": config.training.global_batch_size,
        "training.eval_iters": config.training.eval_iters,
        "training.max_nonfinite_iters": config.training.max_nonfinite_iters,
        "checkpoint.save_interval": config.checkpoint.save_interval,
        "evaluation.num_prompts": config.evaluation.num_prompts,
        "logging.log_interval": config.logging.log_interval,
        "data.seq_length": config.data.seq_length,
        "model.decoder.num_layers": config.model.decoder.num_layers,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{key}={value} must be at least 1")
    zero_or_more = {
        "training.eval_interval": config.training.eval_interval,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "evaluation.every": config.evaluation.every,
        "logging.image_interval": config.logging.image_interval,
        "data.num_workers": config.data.num_workers,
        "data.max_bad_images": config.data.max_bad_images,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.clip_grad": config.optimizer.clip_grad,
        "optimizer.lr_warmup_iters": config.optimizer.lr_warmup_iters,
    }
    for key, value in zero_or_more.items():
        if value < 0:
            raise ConfigError(f"{key}={value} must not be negative")
    traced = config.logging.trace_iteration
    if traced is not None and not 1 <= traced < config.training.train_iters:
        raise ConfigError(
            f"logging.trace_iteration={traced} must lie between 1 and "
            f"{config.training.train_iters - 1}: the iteration after it ends the trace "
            f"(training.train_iters={config.training.train_iters})"
        )
    probabilities = {
        "model.decoder.hidden_dropout": config.model.decoder.hidden_dropout,
        "model.decoder.attention_dropout": config.model.decoder.attention_dropout,
        "model.resampler.attention_dropout": config.model.resampler.attention_dropout,
        "data.caption_drop_prob": config.data.caption_drop_prob,
        "data.entity_text_drop_prob": config.data.entity_text_drop_prob,
        "data.background_keep_prob": config.data.background_keep_prob,
        "score.condition_drop_prob": config.score.condition_drop_prob,
        "score.audit_rate": config.score.audit_rate,
    }
    for key, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{key}={value} is a probability; it must lie in 0..1")
    for section, blend in (("blend", config.data.blend), ("heldout", config.data.heldout)):
        for name, entry in blend.items():
            if entry.weight <= 0:
                raise ConfigError(
                    f"data.{section}.{name}.weight={entry.weight} must be above 0; "
                    f"data.{section}.{name}=null leaves the dataset out"
                )


def _check_world_size(config: RunConfig, world_size: int) -> None:
    planned = config.parallel.world_size
    if planned is not None and planned != world_size:
        raise ConfigError(
            f"this run was started with {world_size} ranks but parallel.world_size={planned}; "
            f"start {planned} ranks or set parallel.world_size={world_size} (null takes any number)"
        )


def _check_score(config: RunConfig) -> None:
    if config.score.window > _WIDEST_WINDOW:
        raise ConfigError(
            f"score.window={config.score.window} must be at most {_WIDEST_WINDOW}: activations of "
            "that many more micro-batches are kept"
        )
    for key in ("answer_seconds", "wait_seconds"):
        if getattr(config.score, key) <= 0:
            raise ConfigError(f"score.{key}={getattr(config.score, key)} must be positive")


def _check_grid(config: RunConfig, facts: StageFacts) -> None:
    if config.evaluation.grid and not facts.has_unet:
        raise ConfigError(
            f"evaluation.grid=[{', '.join(config.evaluation.grid)}] means nothing to "
            f"stage={config.stage}: only instruct draws images; set evaluation.grid=[]"
        )
    if config.evaluation.every and not config.evaluation.grid:
        raise ConfigError(
            f"evaluation.every={config.evaluation.every} measures nothing without evaluators; name "
            "some in evaluation.grid, or set evaluation.every=0"
        )


def _check_packing(config: RunConfig, facts: StageFacts) -> None:
    if config.data.pack_prompts and facts.packs_rows:
        raise ConfigError(
            f"data.pack_prompts=true means nothing to stage={config.stage}: its rows are filled "
            "with documents in any case; set data.pack_prompts=false"
        )


def _check_performance(config: RunConfig) -> None:
    if config.performance.compile == "cudagraph" and config.score.recompute:
        raise ConfigError(
            "performance.compile=cudagraph cannot record a U-Net that recomputes its activations; "
            "set score.recompute=false or performance.compile=regional"
        )


def _check_lora(config: RunConfig, facts: StageFacts) -> None:
    lora = config.lora
    if lora.rank < 0 or lora.alpha <= 0:
        settings = f"lora.rank={lora.rank}, lora.alpha={lora.alpha:g}"
        raise ConfigError(f"{settings}: the rank must be 0 (no adapters) or more, alpha above 0")
    if not lora.rank:
        return
    if facts.name != "instruct":
        nothing = f"lora.rank={lora.rank} means nothing to stage={config.stage}"
        raise ConfigError(f"{nothing}: adapters are trained in instruct; set lora.rank=0")
    beside = [name for name in facts.trained if name != "decoder"]
    wrong = [name for name in lora.trains if name not in beside]
    if wrong:
        may = f"beside the decoder's adapters may train {', '.join(beside)}"
        raise ConfigError(f"lora.trains names {', '.join(wrong)}; {may}")


def _check_tensor_parallel(config: RunConfig, facts: StageFacts) -> None:
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    split = {
        "model.decoder.num_attention_heads": model.decoder.num_attention_heads,
        "model.decoder.ffn_hidden_size": model.decoder.ffn_hidden_size,
        "model.resampler.num_attention_heads": model.resampler.num_attention_heads,
    }
    if facts.aligner_parts and model.aligner.kind != "none":
        split["model.aligner.num_attention_heads"] = model.aligner.num_attention_heads
        split["model.aligner.ffn_hidden_size"] = model.aligner.ffn_hidden_size
    for key, value in split.items():
        if value % tp:
            fitting = ", ".join(map(str, divisors(math.gcd(*split.values()))))
            raise ConfigError(
                f"{key}={value} must be divisible by parallel.tensor_model_parallel_size={tp}; "
                f"tensor-parallel sizes that divide all heads and widths: {fitting}"
            )
    widths = {
        "model.decoder": (model.decoder.hidden_size, model.decoder.num_attention_heads),
        "model.vision": (model.vision.hidden_size, model.vision.num_attention_heads),
        "model.aligner": (model.aligner.hidden_size, model.aligner.num_attention_heads),
        "model.resampler": (model.decoder.hidden_size, model.resampler.num_attention_heads),
    }
    for section, (hidden, heads) in widths.items():
        if hidden % heads:
            raise ConfigError(
                f"{section}.num_attention_heads={heads} must divide the hidden size {hidden}; "
                f"nearest: {_nearest(heads, divisors(hidden))}"
            )
    if config.parallel.sequence_parallel and tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; "
            "set parallel.sequence_parallel=false"
        )
    if model.vision.image_size % model.vision.patch_size:
        raise ConfigError(
            f"model.vision.image_size={model.vision.image_size} must be a multiple of "
            f"model.vision.patch_size={model.vision.patch_size}"
        )
    if model.vision.num_trainable_layers > model.vision.num_layers:
        raise ConfigError(
            f"model.vision.num_trainable_layers={model.vision.num_trainable_layers} exceeds "
            f"model.vision.num_layers={model.vision.num_layers}"
        )


def _check_pipeline(config: RunConfig) -> None:
    parallel, layers = config.parallel, config.model.decoder.num_layers
    pp_size = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None:
        if virtual < 2:
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size={virtual} must be at least 2; "
                "null turns interleaving off"
            )
        if pp_size <= 2:
            raise ConfigError(
                f"interleaving (parallel.virtual_pipeline_model_parallel_size={virtual}) with "
                f"parallel.pipeline_model_parallel_size={pp_size} would exchange wrong tensors "
                "between the pipeline stages without an error; set "
                "parallel.pipeline_model_parallel_size to 3 or more, or "
                "parallel.virtual_pipeline_model_parallel_size=null"
            )
    num_pipeline_stages = pp_size * (virtual or 1)
    if parallel.pipeline_layout is None and layers < num_pipeline_stages:
        shape = (
            f"{pp_size} ranks x {virtual} = {num_pipeline_stages}"
            if virtual
            else str(num_pipeline_stages)
        )
        fewer = layers // pp_size
        instead = (
            f"parallel.pipeline_model_parallel_size to at most {layers // (virtual or 1)}"
            if virtual is None or layers // virtual > 2
            else ""
        )
        if virtual:
            chunks = str(fewer) if fewer > 1 else "null"
            instead += (" or " if instead else "") + (
                f"parallel.virtual_pipeline_model_parallel_size to {chunks}"
            )
        raise ConfigError(
            f"model.decoder.num_layers={layers} cannot fill {shape} pipeline stages; set "
            f"{instead}, or give parallel.pipeline_layout"
        )


def _check_microbatches(config: RunConfig, dp_size: int) -> None:
    microbatches = num_microbatches(config, dp_size)
    pp_size, training = config.parallel.pipeline_model_parallel_size, config.training
    if config.parallel.virtual_pipeline_model_parallel_size is None or microbatches % pp_size == 0:
        return
    batches = neighbours(training.global_batch_size, training.micro_batch_size * dp_size * pp_size)
    sizes = [
        size
        for size in divisors(training.global_batch_size // dp_size)
        if training.global_batch_size // (dp_size * size) % pp_size == 0
    ]
    instead = f"training.micro_batch_size to {', '.join(map(str, sizes))} or " if sizes else ""
    raise ConfigError(
        f"{microbatches} micro-batches per update and replica do not divide into groups of "
        f"parallel.pipeline_model_parallel_size ({pp_size}), which the interleaved schedule needs; "
        f"set {instead}training.global_batch_size to {batches}"
    )


def _check_overlap(config: RunConfig) -> None:
    parallel = config.parallel
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        raise ConfigError(
            "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true "
            "and parallel.overlap_grad_reduce=true"
        )


def _check_optimizer_states(config: RunConfig) -> None:
    settings, precision = config.optimizer, config.training.precision
    fraction = settings.optimizer_offload_fraction
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"optimizer.optimizer_offload_fraction={fraction} must be above 0 and at most 1; "
            "optimizer.optimizer_cpu_offload=false keeps all states on the GPU"
        )
    aware, offload = "optimizer.use_precision_aware_optimizer", "optimizer.optimizer_cpu_offload"
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = getattr(settings, name)
        if dtype != "fp32" and not settings.use_precision_aware_optimizer:
            raise ConfigError(
                f"optimizer.{name}={dtype} needs {aware}=true (and TransformerEngine); "
                f"set optimizer.{name}=fp32"
            )
    if settings.use_precision_aware_optimizer and settings.optimizer_cpu_offload:
        raise ConfigError(
            f"{offload}=true keeps float32 states on the host and {aware}=true others on the GPU: "
            "set one of them to false"
        )
    on = [(aware, settings.use_precision_aware_optimizer)]
    on.append((offload, settings.optimizer_cpu_offload))
    for key in [key for key, is_on in on if is_on]:
        if not config.parallel.use_distributed_optimizer:
            raise ConfigError(
                f"{key}=true needs parallel.use_distributed_optimizer=true, also on one GPU"
            )
        if precision == "fp32":
            raise ConfigError(
                f"{key}=true needs training.precision=bf16 or fp16: float32 weights are their own "
                f"float32 copy; set {key}=false"
            )
        if settings.ema_decay:
            raise ConfigError(
                f"optimizer.ema_decay={settings.ema_decay} averages the optimizer's float32 "
                f"weights, which {key}=true keeps out of its reach; set one of them to 0 or false"
            )


def _check_schedule(config: RunConfig) -> None:
    optimizer = config.optimizer
    decay_iters = optimizer.lr_decay_iters or config.training.train_iters
    if optimizer.lr_warmup_iters >= decay_iters:
        raise ConfigError(
            f"optimizer.lr_warmup_iters={optimizer.lr_warmup_iters} must be below the end of the "
            f"decay ({decay_iters}: optimizer.lr_decay_iters, or training.train_iters when null)"
        )
    if not 0 <= optimizer.min_lr <= optimizer.lr or optimizer.lr == 0:
        raise ConfigError(
            f"optimizer.lr={optimizer.lr} must be above 0 and not below "
            f"optimizer.min_lr={optimizer.min_lr}"
        )
    decays = {
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "ema_decay": optimizer.ema_decay,
    }
    for key, beta in decays.items():
        if not 0 <= beta < 1:
            raise ConfigError(f"optimizer.{key}={beta} must lie in 0..1 (1 excluded)")


def _nearest(value: int, choices: list[int]) -> str:
    below = [choice for choice in choices if choice <= value]
    above = [choice for choice in choices if choice > value]
    return " or ".join(map(str, below[-1:] + above[:1]))
