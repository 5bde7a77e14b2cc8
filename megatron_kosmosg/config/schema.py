"""Every setting of a run, as frozen dataclasses with the paper's values as defaults.

Names are Megatron's where Megatron has one. A string under a field documents it, unit first.
Values the paper does not state come from the authors' released scripts (arXiv 2310.02992, code of
2024-04); where the two disagree the field says which one is used. The longest file of `config`
because it is the reference page of all settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DecoderConfig:
    """MAGNETO language decoder (paper section 2.1)."""

    num_layers: int = 24
    hidden_size: int = 2048
    ffn_hidden_size: int = 8192
    num_attention_heads: int = 32
    hidden_dropout: float = 0.1
    """Probability, after embedding, attention output and feed-forward output."""
    attention_dropout: float = 0.0
    """Probability. The authors configure 0.1, but their flash kernel never applies it."""
    layernorm_epsilon: float = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    """CLIP ViT image tower; defaults are ViT-L/14."""

    path: str | None = None
    """Folder of a Hugging Face `CLIPVisionModel` that gives the initial weights in `pretrain`."""
    num_layers: int = 24
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_attention_heads: int = 16
    image_size: int = 224
    """Pixels per side of the square input."""
    patch_size: int = 14
    """Pixels per side of one patch."""
    num_trainable_layers: int = 1
    """Blocks, counted from the last, that train together with the post-norm."""


@dataclass(frozen=True)
class ResamplerConfig:
    """Latent queries that turn patch features into decoder inputs."""

    num_latent_queries: int = 64
    """Decoder positions per image."""
    num_attention_heads: int = 32
    attention_dropout: float = 0.1
    """Probability, in training."""


@dataclass(frozen=True)
class AlignerConfig:
    """AlignerNet M (to the text-encoder space) and N (back); paper section 2.2."""

    kind: Literal["full", "decoder_only", "none"] = "full"
    """Variant of the paper's Table 2: `decoder_only` drops M's self-attention encoder,
    `none` is one linear map per position."""
    num_layers: int = 12
    """Layers of each of the stacks (two in M, two in N)."""
    hidden_size: int = 768
    ffn_hidden_size: int = 3072
    num_attention_heads: int = 12
    num_queries: int = 77
    """Positions of the condition that the U-Net reads."""
    max_positions: int = 32768
    """Rows of each learned position table; the longest prompt is two less."""


@dataclass(frozen=True)
class FrozenFolder:
    """A frozen component read from a local folder."""

    path: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 64007
    """Tokens, without the rows that tensor parallelism pads."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    aligner: AlignerConfig = field(default_factory=AlignerConfig)
    diffusion: FrozenFolder = field(default_factory=FrozenFolder)
    """Stable Diffusion folder (`unet/ vae/ scheduler/`), needed by `instruct`."""
    clip_text: FrozenFolder = field(default_factory=FrozenFolder)
    """Folder that holds `text_encoder/` and `tokenizer/`, needed by `align`."""


@dataclass(frozen=True)
class BlendEntry:
    """One dataset of the mixture that a stage trains on."""

    path: str = "???"
    """Prefix of the dataset written by `kosmosg preprocess`: a `.bin/.idx` pair, or a `.json` that
    lists its shards."""
    weight: float = 1.0
    """Relative share of the mixture: rows in `pretrain`, samples elsewhere."""
    kind: str | None = None
    """Kind of its samples (text, caption, ...), for plans made where the dataset is not; null takes
    it from the dataset's manifest. Another kind than the manifest's is an error."""


@dataclass(frozen=True)
class DataConfig:
    tokenizer_model: str | None = None
    """SentencePiece model file."""
    blend: dict[str, BlendEntry] = field(default_factory=dict)
    """Training mixture, by name."""
    heldout: dict[str, BlendEntry] = field(default_factory=dict)
    """Mixture on which the loss is evaluated, by name."""
    seq_length: int = 2048
    """Tokens per packed row in `pretrain`; longest prompt elsewhere."""
    image_backend: Literal["auto", "dali", "pillow"] = "auto"
    """`auto` takes DALI when it imports."""
    num_workers: int = 1
    """Threads that read ahead of training on each loading rank; 0 reads in the training thread."""
    balance_tokens: bool = True
    """Deal the samples of a global batch to ranks and micro-batches by length (`instruct`; the rows
    of the other stages are equally long). The batch, its noise and its loss stay the same."""
    pack_prompts: bool = False
    """Lay the prompts of a micro-batch end to end in one row for the decoder, which then computes
    no padding; each attends to itself and counts positions from its own start (`align`,
    `instruct`). `instruct` learns the same; in `align` padding then does not count in the loss."""
    target_image_size: int = 512
    """Pixels per side of the image the U-Net learns to draw."""
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    caption_drop_prob: float = 0.5
    """Probability that an edit sample loses the caption of its original image."""
    entity_text_drop_prob: float = 0.5
    """Probability that entity words are dropped, leaving only the image."""
    entity_text_drop_per: Literal["sample", "entity"] = "sample"
    """One coin per sample (the authors' code) or per entity (as the paper reads)."""
    background_keep_prob: float = 0.5
    """Probability that an entity's image keeps its background instead of white."""
    latent_cache: str | None = None
    """Name of the cached latents of target images that `kosmosg cache-latents` left beside each
    dataset of data.blend (`instruct`); null encodes the images while training."""
    max_bad_images: int = 100
    """Undecodable images, over all ranks and restarts, above which the run stops."""


@dataclass(frozen=True)
class ParallelConfig:
    world_size: int | None = None
    """Ranks this config is made for: `--dry-run` plans them, a start with another number is
    refused. Null takes any number that fits."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Pipeline stages per rank (interleaving); needs pipeline_model_parallel_size > 2 and micro-
    batches in multiples of it."""
    sequence_parallel: bool = False
    """Split the decoder's norms and dropouts along the sequence (decoder only)."""
    pipeline_layout: str | None = None
    """What each pipeline stage holds, the stages separated by `|`: `decoder*13|decoder*11,M,N`, in
    the order of the model; with V stages per rank, V times as many as there are pipeline ranks.
    Default: AlignerNet on the last stage, decoder layers so that the slowest stage has the fewest
    FLOPs."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    timeout_seconds: int = 600
    """Seconds until a collective whose peers are gone fails the run."""
    stall_seconds: int = 120
    """Seconds without progress of any rank, or without a sign of life from one, until the ranks
    that hold the others up are named on stderr."""


@dataclass(frozen=True)
class ScoreConfig:
    """The frozen U-Net that scores the condition (`instruct`)."""

    placement: Literal["colocated", "dedicated"] = "colocated"
    ranks_per_replica: int = 1
    """Score ranks per decoder replica (`dedicated`)."""
    replicas_per_rank: int = 1
    """Decoder replicas that share one score rank (`dedicated`)."""
    window: int = 2
    """Micro-batches in flight between decoder and score ranks (`dedicated`), at most 16; decoder
    ranks keep the activations of one fewer in addition to their own."""
    condition_drop_prob: float = 0.1
    """Probability per image that the condition is replaced by the null condition."""
    loss_weighting: Literal["none", "min_snr", "capped_snr_plus_one"] = "none"
    """`none` is the paper's. In terms of the error of the predicted latents the others are
    min(SNR, gamma) (arXiv 2303.09556) and min(SNR + 1, gamma) (arXiv 2202.00512, capped)."""
    snr_gamma: float = 5.0
    timestep_sampling: Literal["uniform", "power"] = "uniform"
    """`uniform` is the paper's; `power` draws T * u**timestep_power."""
    timestep_power: float = 1.0
    recompute: bool = False
    """Gradient checkpointing inside the U-Net."""
    answer_seconds: float = 60.0
    """Seconds without an answer after which another score rank gets the request, too
    (`dedicated`)."""
    wait_seconds: float = 120.0
    """Seconds that training waits for a score rank when none is left, before it saves and stops; at
    most half of parallel.timeout_seconds (`dedicated`)."""
    audit_rate: float = 0.0
    """Share of the answers of joined score ranks that a rank of the job computes again."""
    listen_address: str | None = None
    """Address at which decoder ranks listen for score ranks; null: of the interface through which
    the ranks of the job meet (`dedicated`)."""


@dataclass(frozen=True)
class TrainingConfig:
    train_iters: int = 200000
    """Optimizer updates."""
    micro_batch_size: int = 1
    """Samples per forward pass of one data-parallel replica."""
    global_batch_size: int = 1
    """Samples per optimizer update, over all replicas."""
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute in the trainable transformer stacks."""
    eval_interval: int = 0
    """Iterations between evaluations; 0 evaluates only at the end."""
    eval_iters: int = 10
    """Global batches per evaluation."""
    max_nonfinite_iters: int = 100
    """Consecutive skipped updates (non-finite loss or gradient) after which the run stops."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the decoder's linear layers (arXiv 2106.09685), whose weights then stay
    as they are (`instruct`)."""

    rank: int = 0
    """Of every adapter; 0 trains the whole decoder instead."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    trains: list[str] = field(default_factory=lambda: ["aligner_m"])
    """Parts that train whole beside the adapters: aligner_m, resampler, vision_encoder (its last
    blocks), embedding."""


@dataclass(frozen=True)
class PerformanceConfig:
    """How passes run. What is asked of the frozen networks is compared at the start, on one batch,
    with the plain passes, and left aside with one line where it does not give the same."""

    compile: Literal["none", "regional", "cudagraph"] = "none"
    """`regional`: torch.compile of the U-Net's transformer blocks, of its and the VAE encoder's
    residual blocks and of the image tower's frozen blocks. `cudagraph`: the U-Net's passes and the
    VAE's encoder recorded at the size of a micro-batch and replayed (a GPU; has not run on one)."""
    fuse_qkv: bool = False
    """One matrix product for queries, keys and values in the U-Net's attention, at the cost of a
    second copy of these weights."""
    nhwc_group_norm: bool = False
    """NVIDIA apex's group norm for channels-last images in the U-Net (a GPU; has not run on one).
    """
    gradient_accumulation_fusion: bool = True
    """TransformerEngine's linears, and Megatron-Core's own where apex has its kernel, add the
    gradients of trained weights straight to the float32 sums over micro-batches. `false` makes each
    gradient first (a GPU)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; decoupled weight decay hits every trainable tensor, as in the authors' code."""

    lr: float = 1e-3
    min_lr: float = 0.0
    lr_warmup_iters: int = 375
    lr_decay_iters: int | None = None
    """Iterations until `min_lr`; default `training.train_iters`."""
    lr_decay_style: Literal["linear", "cosine", "constant"] = "linear"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-6
    weight_decay: float = 0.01
    clip_grad: float = 2.0
    """Largest global gradient norm (authors' scripts; the paper states none)."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights that train, by update, e.g. 0.9999;
    the first updates decay faster. Kept beside the weights, saved with them, and exported with
    `kosmosg convert export-hf --ema`. 0 keeps none."""
    optimizer_cpu_offload: bool = False
    """Float32 weights and Adam's moments in the machine's memory, where its processors update them:
    12 bytes a trained weight less on the GPU, shared out over replicas, and slower updates (a GPU;
    has not run on one)."""
    optimizer_offload_fraction: float = 1.0
    """Share of the trained weights that `optimizer_cpu_offload` concerns."""
    use_precision_aware_optimizer: bool = False
    """Adam's moments in `exp_avg_dtype` and `exp_avg_sq_dtype`, by TransformerEngine's FusedAdam (a
    GPU; has not run on one). Checkpoints hold float32 in any case."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    initial_loss_scale: float = 1024.0
    """fp16 only. The loss is a sum over the micro-batch's items, hence lower than elsewhere."""
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000


@dataclass(frozen=True)
class CheckpointConfig:
    save: str | None = None
    """Folder for checkpoints; default `<logging.output_dir>/checkpoints`."""
    load: str | None = None
    """Run or checkpoint folder of the previous stage that gives the initial weights."""
    load_stage: Literal["previous", "pretrain", "align", "instruct"] = "previous"
    """Stage whose checkpoint `load` must be. `instruct` from a `pretrain` checkpoint starts with a
    new AlignerNet (the paper's ablation without alignment)."""
    save_interval: int = 2000
    """Iterations between checkpoints; the last iteration is always saved."""
    async_save: bool = False
    weights: Literal["auto", "all", "trained"] = "auto"
    """Weights in a checkpoint: `all`, so that it stands alone, or those that are `trained`, with
    the path and fingerprint of the checkpoint (`load`) that holds the others. `auto` is `trained`
    with adapters (`lora.rank`) and `all` without."""
    keep_last: int = 2
    """Newest finished checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Beside those, every checkpoint whose iteration is a multiple of this is kept; 0 for none."""
    accept_changes: list[str] = field(default_factory=list)
    """Settings (or whole sections) that may differ from the resumed checkpoint although they
    change what is learnt, e.g. `[optimizer.lr, data.blend]`."""


@dataclass(frozen=True)
class EvaluationConfig:
    grid: list[str] = field(default_factory=list)
    """Evaluators that measure the images of the grid (`instruct`) against their targets, by their
    names in evaluation/registry.py: `toy` reads shapes and hues of the toy world, `dino` and `clip`
    take the cosine of features."""
    every: int = 0
    """Iterations between measurements of `num_prompts` held-out prompts; the end is measured, too.
    0 measures the images of each image grid, and no others."""
    num_prompts: int = 16
    """Held-out prompts of a measurement, always the same: the first of the held-out mixture."""
    dino: str | None = None
    """Weight file of the evaluator `dino` (dino_deitsmall16_pretrain.pth)."""
    clip: str | None = None
    """Folder of the evaluator `clip` (openai/clip-vit-base-patch32)."""


@dataclass(frozen=True)
class LoggingConfig:
    output_dir: str = "???"
    """Folder of this run."""
    log_interval: int = 10
    """Iterations between log lines; metrics.jsonl has every iteration."""
    tensorboard: bool = True
    wandb: str | None = None
    """Project of Weights & Biases that gets numbers and images, too (needs the extra `wandb`).
    WANDB_MODE=offline keeps them in the run's folder."""
    image_interval: int = 0
    """Iterations between image grids of fixed prompts (`instruct`); 0 draws only at the end."""
    num_images: int = 8
    """Held-out prompts in the grid."""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    trace_iteration: int | None = None
    """Iteration, before the last one, of which all ranks leave their forward and backward passes,
    exchanges and waits in `trace.json`, for ui.perfetto.dev or chrome://tracing."""
    notify: str | None = None
    """Who is told when the run starts, is stopped, fails and ends: an address (http, https), which
    gets JSON by POST, or a command line, which gets it on stdin."""
    planned_gpu: str | None = None
    """GPU that the run is planned for when it starts (`plan.json`, and after 50 iterations a line
    of measured against planned): a name of `kosmosg plan --gpu` or a YAML file; null takes the GPU
    that rank 0 has where that is one of them, and plans nothing else."""
    peak_tflops: float = 989.0
    """TFLOP/s of one device in the training precision; the denominator of `mfu`."""


@dataclass(frozen=True)
class RunConfig:
    stage: Literal["pretrain", "align", "instruct"] = "???"  # type: ignore[assignment]  # what omegaconf calls required
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
