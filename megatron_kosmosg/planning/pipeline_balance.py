"""How many decoder layers each pipeline stage gets when its stages are to take equally long."""

from __future__ import annotations

from dataclasses import replace

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.models.pipeline_pieces import pipeline_pieces
from megatron_kosmosg.planning.stage_work import score_work, stage_work
from megatron_kosmosg.planning.workload import micro_batches


def balanced_layout(config: RunConfig, parts: tuple[str, ...]) -> str | None:
    """`parallel.pipeline_layout` whose slowest stage has the fewest FLOPs; None without stages.

    AlignerNet stays on the last stage, beside a colocated U-Net.
    """
    stages, layers = config.parallel.pipeline_model_parallel_size, config.model.decoder.num_layers
    if stages == 1:
        return None
    (batch,) = micro_batches(config, 1)
    whole = replace(config.parallel, pipeline_model_parallel_size=1, pipeline_layout=None)
    (piece,) = pipeline_pieces(replace(config, parallel=whole), parts)
    work = {w.module: w.forward + w.backward for w in stage_work(config, piece, True, batch)}
    layer = work.pop("decoder") / layers
    first = sum(work.pop(name, 0.0) for name in ("vision", "resampler"))
    last = sum(work.values())
    if config.stage == "instruct" and config.score.placement == "colocated":
        rows = -(-batch.images // config.parallel.tensor_model_parallel_size)
        last += sum(w.forward + w.backward for w in score_work(config, rows))
    counts, loads = [1] + [0 if parts else 1] * (stages - 1), [0.0] * stages
    counts[1:-1] = [1] * (stages - 2)
    loads[0], loads[-1] = first, last
    loads = [load + layer * count for load, count in zip(loads, counts, strict=True)]
    for _ in range(layers - sum(counts)):
        stage = loads.index(min(loads))
        counts[stage], loads[stage] = counts[stage] + 1, loads[stage] + layer
    pieces = [[f"decoder*{count}"] if count else [] for count in counts]
    pieces[-1] += parts
    return "|".join(",".join(piece) for piece in pieces)
