"""The default of `parallel.pipeline_layout`: pipeline stages whose slowest has the fewest FLOPs."""

from __future__ import annotations

from dataclasses import replace

from megatron_kosmosg.config.rank_grid import has_score_ranks
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.pipeline_stage_specs import chunks_per_rank, pipeline_stage_specs
from megatron_kosmosg.planning.pipeline_stage_cost import pipeline_stage_work, score_work
from megatron_kosmosg.planning.workload import micro_batches, with_kinds
from megatron_kosmosg.stages import stage_facts


def with_default_layout(config: RunConfig) -> RunConfig:
    """The config with the balanced pipeline_layout, where it has several pipeline stages and names
    none.

    The kinds of its datasets are those of their manifests, as in `workload.with_kinds`, which says
    what it raises.
    """
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size == 1 or parallel.pipeline_layout is not None:
        return config
    layout = balanced_layout(with_kinds(config))
    return replace(config, parallel=replace(parallel, pipeline_layout=layout))


def balanced_layout(config: RunConfig) -> str | None:
    """The layout over the pipeline stages of `config`, of which the decoder's layers must be at
    least as many; None for a single pipeline stage.

    AlignerNet goes to the last pipeline stage, beside a colocated U-Net, without decoder layers
    where it is heavy.
    """
    if config.parallel.pipeline_model_parallel_size == 1:
        return None
    parts = stage_facts(config.stage).aligner_parts
    layers = config.model.decoder.num_layers
    num_pipeline_stages = config.parallel.pipeline_model_parallel_size * chunks_per_rank(config)
    first, layer, last = _loads(config, parts)
    counts = [1] * (num_pipeline_stages - 1) + [0 if parts else 1]
    loads = [layer * count for count in counts]
    loads[0] += first
    loads[-1] += last
    for _ in range(layers - sum(counts)):
        pipeline_stage = loads.index(min(loads))
        counts[pipeline_stage], loads[pipeline_stage] = (
            counts[pipeline_stage] + 1,
            loads[pipeline_stage] + layer,
        )
    pieces = [[f"decoder*{count}"] if count else [] for count in counts]
    pieces[-1] += parts
    return "|".join(",".join(spec) for spec in pieces)


def _loads(config: RunConfig, parts: tuple[str, ...]) -> tuple[float, float, float]:
    """FLOPs of an ordinary micro-batch: images, one decoder layer, what follows the decoder."""
    (batch,) = micro_batches(config, 1)
    whole = replace(
        config.parallel,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        pipeline_layout=None,
    )
    (spec,) = pipeline_stage_specs(replace(config, parallel=whole), parts)
    work = {
        w.module: w.forward + w.backward for w in pipeline_stage_work(config, spec, True, batch)
    }
    layer = work.pop("decoder") / config.model.decoder.num_layers
    first = sum(work.pop(name, 0.0) for name in ("vision", "resampler"))
    last = sum(work.values())
    if stage_facts(config.stage).has_unet and not has_score_ranks(config):
        rows = -(-batch.images // config.parallel.tensor_model_parallel_size)
        last += sum(w.forward + w.backward for w in score_work(config, rows))
    return first, layer, last
