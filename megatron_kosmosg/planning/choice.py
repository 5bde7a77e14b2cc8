"""One point of a search: the settings that it varies, in a config and on the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_kosmosg.config.schema import RunConfig


@dataclass(frozen=True)
class Choice:
    """The settings that a search varies."""

    tensor: int
    pipeline: int
    pipeline_layout: str | None
    placement: str
    ranks_per_replica: int
    replicas_per_rank: int
    window: int
    micro_batch_size: int
    recompute: str
    score_recompute: bool
    cached_latents: bool

    @property
    def score(self) -> str:
        """Placement and ratio, in short."""
        if self.placement == "colocated":
            return "colocated"
        if self.replicas_per_rank > 1:
            return f"dedicated 1 for {self.replicas_per_rank}"
        return f"dedicated {self.ranks_per_replica}"

    def overrides(self, stage: str) -> list[str]:
        """Settings for the command line of training and of this tool."""
        lines = [
            f"parallel.tensor_model_parallel_size={self.tensor}",
            f"parallel.sequence_parallel={str(self.tensor > 1).lower()}",
            f"parallel.pipeline_model_parallel_size={self.pipeline}",
            "parallel.use_distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.recompute={self.recompute}",
        ]
        if self.pipeline_layout is not None:
            lines.append(f"parallel.pipeline_layout={self.pipeline_layout}")
        if stage == "instruct":
            lines += [
                f"score.placement={self.placement}",
                f"score.ranks_per_replica={self.ranks_per_replica}",
                f"score.replicas_per_rank={self.replicas_per_rank}",
                f"score.window={self.window}",
                f"score.recompute={str(self.score_recompute).lower()}",
                f"data.latent_cache={'latents' if self.cached_latents else 'null'}",
            ]
        return lines


def with_choice(config: RunConfig, choice: Choice, world_size: int) -> RunConfig:
    """`config` with the settings of a choice; exchanges overlap wherever there are replicas."""
    return replace(
        config,
        parallel=replace(
            config.parallel,
            world_size=world_size,
            tensor_model_parallel_size=choice.tensor,
            pipeline_model_parallel_size=choice.pipeline,
            virtual_pipeline_model_parallel_size=None,
            sequence_parallel=choice.tensor > 1,
            pipeline_layout=choice.pipeline_layout,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        score=replace(
            config.score,
            placement=choice.placement,
            ranks_per_replica=choice.ranks_per_replica,
            replicas_per_rank=choice.replicas_per_rank,
            window=choice.window,
            recompute=choice.score_recompute,
        ),
        training=replace(
            config.training,
            micro_batch_size=choice.micro_batch_size,
            recompute=choice.recompute,
        ),
        data=replace(
            config.data,
            latent_cache=(config.data.latent_cache or "latents") if choice.cached_latents else None,
        ),
    )
