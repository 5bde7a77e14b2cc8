"""The kinds of rank of a layout (one for every pipeline stage, and dedicated score ranks), and the
bytes that each holds: parameters, gradients, optimizer, activations, U-Net, overhead.

What the frozen U-Net keeps for its condition's gradient is counted on the real class: its forward
pass runs on the meta device under hooks that see every tensor saved; attention is replaced by one
that keeps what fused kernels keep, instead of its matrix.

Long because the kinds of rank, their sums and the table of them are one subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch.overrides import TorchFunctionMode

from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.diffusion_flops import unet_and_vae
from megatron_kosmosg.models.pipeline_stage_specs import PipelineStageSpec
from megatron_kosmosg.planning.activations import ELEMENT_BYTES, pipeline_stage_activations
from megatron_kosmosg.planning.gpus import Efficiency
from megatron_kosmosg.planning.model_counts import ModelShares, RankCount, frozen_helpers
from megatron_kosmosg.planning.workload import MicroBatch, score_share
from megatron_kosmosg.stages import stage_facts

GIB = 2**30


@dataclass(frozen=True)
class RankMemory:
    """The peak of the bytes that one rank holds, by what they are for."""

    parameters: float
    """In the training precision, trained and frozen."""
    gradients: float
    """float32, for what trains here."""
    optimizer: float
    """float32 copy of the parameters, two Adam moments and the average of the weights where one is
    kept, this rank's share; without what is kept on the host (`host_memory.py`)."""
    activations: float
    """Of all micro-batches in flight, and what passes through the layer at work beyond what the
    U-Net, which works at another time, takes anyway. Moments of less than float32 in float32, for
    the update, where that is more."""
    frozen_helpers: float
    """Weights of U-Net and VAE, or of the text encoder."""
    score_activations: float
    """Of the U-Net (or the VAE before it), for the images this rank scores at once."""
    context: float
    """CUDA context and NCCL's buffers."""
    workspaces: float
    """Of cuBLAS and cuDNN."""
    fragmentation: float
    """What the allocator holds beside the tensors."""

    @property
    def overhead(self) -> float:
        """The bytes that no memory tracker sees."""
        return self.context + self.workspaces + self.fragmentation

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def tensors(self) -> float:
        """The bytes that a memory tracker sees: all but the overhead."""
        return self.total - self.overhead


def decoder_memory(
    config: RunConfig,
    world: RankGrid,
    spec: PipelineStageSpec,
    pp_rank: int,
    count: RankCount,
    batches: Sequence[MicroBatch],
    efficiency: Efficiency,
) -> RankMemory:
    """The memory of the ranks of one pipeline stage. `batches` are the replica's micro-batches of
    one update."""
    parallel, precision = config.parallel, config.training.precision
    element = ELEMENT_BYTES[precision]
    is_last = pp_rank == world.pp_size - 1
    largest = max(batches, key=lambda batch: (batch.positions, batch.prompt_images))
    activations = pipeline_stage_activations(config, spec, is_last, largest)
    in_flight = min(world.pp_size - pp_rank + _ahead(config, world), len(batches))
    sharing = world.num_replicas if parallel.use_distributed_optimizer else 1
    states, updating = _optimizer_bytes(config)
    helpers = is_last and not world.score_ranks_per_unit
    helper_bytes, score_bytes = 0.0, 0.0
    if helpers:
        helper_bytes = sum(frozen_helpers(config).values()) * element
    if helpers and stage_facts(config.stage).has_unet:
        score_bytes = _score_activations(config, -(-largest.images // world.tp_size))
    tensors = (
        count.gradient_elements * element + count.frozen * element,
        count.gradient_elements * 4,
        count.gradient_elements / sharing * states,
        # The decoder's backward starts when the U-Net's is over, and the update after both: the
        # larger counts.
        max(
            activations.saved * in_flight
            + activations.ahead
            + max(0, activations.passing - score_bytes),
            count.gradient_elements / sharing * updating - score_bytes,
        ),
        helper_bytes,
        score_bytes,
    )
    return RankMemory(*tensors, *_overhead(sum(tensors), efficiency))


def score_memory(config: RunConfig, rows: int, efficiency: Efficiency) -> RankMemory:
    """The memory of a dedicated score rank that takes `rows` images at once."""
    weights = sum(frozen_helpers(config).values()) * ELEMENT_BYTES[config.training.precision]
    activations = _score_activations(config, rows)
    overhead = _overhead(weights + activations, efficiency)
    return RankMemory(0, 0, 0, 0, weights, activations, *overhead)


def _optimizer_bytes(config: RunConfig) -> tuple[float, float]:
    """On the GPU, of a weight that trains: always, and during an update."""
    settings, precision = config.optimizer, config.training.precision
    master_copy = 4 if precision != "fp32" else 0  # fp32 parameters are their own master copy
    average = 4 if settings.ema_decay else 0
    dtypes = settings.exp_avg_dtype, settings.exp_avg_sq_dtype
    moments = sum(ELEMENT_BYTES[dtype] for dtype in dtypes)
    # TransformerEngine's FusedAdam works on float32 copies of all moments at once.
    updating = sum(4 for dtype in dtypes if dtype != "fp32")
    kept = 1 - settings.optimizer_offload_fraction if settings.optimizer_cpu_offload else 1
    return (moments + master_copy) * kept + average, updating


def _ahead(config: RunConfig, world: RankGrid) -> int:
    """Micro-batches beyond Megatron's own that wait for a dedicated score rank."""
    return config.score.window - 1 if world.score_ranks_per_unit else 0


def _score_activations(config: RunConfig, rows: int) -> float:
    saved, feature_map = unet_bytes(
        config.model.diffusion.path,
        config.data.target_image_size,
        config.model.aligner.num_queries,
    )
    scale = ELEMENT_BYTES[config.training.precision] / ELEMENT_BYTES["fp32"]
    peak = RECOMPUTED_PEAK_OVER_SAVED if config.score.recompute else PEAK_OVER_SAVED
    # The VAE runs before the U-Net.
    encoding = 0 if config.data.latent_cache is not None else MAPS_OF_VAE * feature_map
    return rows * scale * max(saved * peak, encoding)


def _overhead(tensors: float, efficiency: Efficiency) -> tuple[float, float, float]:
    """The bytes of (context, workspaces, fragmentation)."""
    context = (efficiency.context_gib + efficiency.nccl_gib) * GIB
    return context, efficiency.workspace_gib * GIB, efficiency.fragmentation * tensors


@dataclass(frozen=True)
class RankKind:
    """The ranks that do the same, and so hold the same."""

    name: str
    holds: str
    count: int
    parameters: RankCount | None
    """None for score ranks."""
    memory: RankMemory


def rank_kinds(
    config: RunConfig,
    world: RankGrid,
    shares: ModelShares,
    batches: Sequence[MicroBatch],
    efficiency: Efficiency,
) -> list[RankKind]:
    """The kinds of rank in the order of the pipeline, score ranks last. `batches` are those of one
    replica in one update."""
    found = [
        RankKind(
            name=f"decoder_stage_{pipeline_stage}" if world.pp_size > 1 else "decoder",
            holds=held.holds,
            count=world.num_replicas * world.tp_size,
            parameters=held,
            memory=decoder_memory(config, world, spec, pipeline_stage, held, batches, efficiency),
        )
        for pipeline_stage, (spec, held) in enumerate(zip(shares.specs, shares.counts, strict=True))
    ]
    if world.score_ranks_per_unit:
        memory = score_memory(config, score_share(config, world, len(batches)).images, efficiency)
        found.append(RankKind("score", "U-Net and VAE", world.num_score_ranks, None, memory))
    return found


PEAK_OVER_SAVED = 1.04
"""Peak of the U-Net's forward and backward over what it saves, rehearsed for Stable Diffusion v1.5:
1.038 in bf16, 1.036 in float32."""
RECOMPUTED_PEAK_OVER_SAVED = 0.31
"""The same with gradient checkpointing: 0.307 in bf16."""
MAPS_OF_VAE = 5.1
"""Maps of its widest level that the VAE's encoder holds at once, rehearsed in the same way."""


@cache
def unet_bytes(path: str | None, image_size: int, condition_length: int) -> tuple[int, int]:
    """(bytes that the U-Net saves for one image, the largest feature map of the VAE's encoder for
    one image), in float32."""
    unet, vae = unet_and_vae(path)
    channels = vae.config["block_out_channels"]
    side = image_size // 2 ** (len(channels) - 1)
    condition = torch.empty(
        1, condition_length, unet.config["cross_attention_dim"], device="meta", requires_grad=True
    )
    latents = torch.empty(1, unet.config["in_channels"], side, side, device="meta")
    kept: dict[int, torch.Tensor] = {}
    held = {p.untyped_storage()._cdata for p in unet.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        unet(latents, torch.zeros(1, dtype=torch.int64, device="meta"), condition)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    feature_map = image_size**2 * channels[0] * latents.element_size()
    return saved, feature_map


class _FusedAttention(TorchFunctionMode):
    """Attention that saves its inputs and its output, as flash kernels do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            keywords = kwargs or {}
            query, key, value = (
                args[i] if i < len(args) else keywords[name]
                for i, name in enumerate(("query", "key", "value"))
            )
            return _SavesInputsAndOutput.apply(query, key, value)
        return func(*args, **(kwargs or {}))


class _SavesInputsAndOutput(torch.autograd.Function):
    """A function of which only the bookkeeping is used: on the meta device there are no numbers."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


_COLUMNS = {
    "parameters": "weights",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "frozen_helpers": "frozen",
    "score_activations": "U-Net act.",
    "overhead": "other",
    "total": "total",
}


def memory_table(
    kinds: Sequence[RankKind], gpu_gib: float | None = None, memory_error: float = 0.0
) -> str:
    """GiB of each kind of rank; whether they fit, where the GPU's memory is given.

    Args:
        memory_error: share of its memory that a rank may take beyond the plan.
    """
    lines = [f"{'GiB a rank':<18}{'ranks':>6}" + "".join(f"{h:>11}" for h in _COLUMNS.values())]
    for kind in kinds:
        memory = kind.memory
        planned = asdict(memory) | {"overhead": memory.overhead, "total": memory.total}
        values = {name: planned[name] / GIB for name in _COLUMNS}
        line = f"{kind.name:<18}{kind.count:>6}" + "".join(f"{v:>11.2f}" for v in values.values())
        if gpu_gib is not None:
            fit = "fits" if values["total"] * (1 + memory_error) <= gpu_gib else "TOO LARGE"
            if fit != "fits" and values["total"] <= gpu_gib:
                fit = f"TOO TIGHT, the plan may be wrong by {memory_error:.0%}"
            line += f" of {gpu_gib:g}: {fit}"
        lines.append(line)
    return "\n".join(lines)
