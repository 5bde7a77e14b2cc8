"""What each pipeline stage holds: a run of decoder layers, and AlignerNet's halves M and N.

`parallel.pipeline_layout` reads "decoder*13|decoder*11,M,N", with `|` between pipeline stages.
Tokens and images are embedded on the first one. A half that the run does not build is skipped.
Interleaved, a rank holds several pipeline stages, its chunks: of 3 ranks with 2 chunks each, the
ranks hold pipeline stages 0 and 3, 1 and 4, 2 and 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import RunConfig

_PIECE = re.compile(r"^(?:decoder(?:\*(\d+))?|[MN])$")


@dataclass(frozen=True)
class PipelineStageSpec:
    """One pipeline stage's share of the model."""

    first_decoder_layer: int
    num_decoder_layers: int
    ends_decoder: bool
    """Whether the decoder's last layer (and its final LayerNorm) is on this pipeline stage."""
    aligner_parts: tuple[str, ...]

    @property
    def has_decoder(self) -> bool:
        """Whether any layer of the decoder is on this pipeline stage."""
        return self.num_decoder_layers > 0 or self.ends_decoder


def pipeline_stage_specs(
    config: RunConfig, aligner_parts: tuple[str, ...]
) -> list[PipelineStageSpec]:
    """The specs of all pipeline stages, in the order of the model.

    There are `pipeline ranks x chunks per rank` of them. Raises ConfigError for a layout that
    cannot be read or does not hold the model.
    """
    num_pipeline_stages = config.parallel.pipeline_model_parallel_size * chunks_per_rank(config)
    num_layers = config.model.decoder.num_layers
    text = config.parallel.pipeline_layout
    if text is None:
        counts = [
            num_layers // num_pipeline_stages + (pipeline_stage < num_layers % num_pipeline_stages)
            for pipeline_stage in range(num_pipeline_stages)
        ]
        parts = [()] * (num_pipeline_stages - 1) + [aligner_parts]
    else:
        counts, named = _parse(text)
        parts = [
            tuple(part for part in pipeline_stage if part in aligner_parts)
            for pipeline_stage in named
        ]
        if not any(named):
            parts[-1] = aligner_parts
        _check(text, counts, parts, num_pipeline_stages, num_layers, aligner_parts)
    specs, first = [], 0
    for count, held_parts in zip(counts, parts, strict=True):
        ends = first < num_layers <= first + count
        specs.append(PipelineStageSpec(first, count, ends, held_parts))
        first += count
    return specs


def chunks_per_rank(config: RunConfig) -> int:
    """Number of pipeline stages that each rank holds."""
    return config.parallel.virtual_pipeline_model_parallel_size or 1


def _parse(text: str) -> tuple[list[int], list[tuple[str, ...]]]:
    counts, named = [], []
    for pipeline_stage in text.replace(" ", "").split("|"):
        layers, halves = 0, []
        for piece in pipeline_stage.split(",") if pipeline_stage else []:
            match = _PIECE.match(piece)
            if match is None:
                raise ConfigError(
                    f"parallel.pipeline_layout={text!r}: {piece!r} is not a piece; use decoder, "
                    "decoder*NUMBER, M and N, with `,` between pieces and `|` between pipeline "
                    "stages"
                )
            if piece in ("M", "N"):
                halves.append(piece)
            else:
                layers += int(match.group(1) or 1)
        counts.append(layers)
        named.append(tuple(halves))
    return counts, named


def _check(
    text: str,
    counts: list[int],
    parts: list[tuple[str, ...]],
    num_pipeline_stages: int,
    num_layers: int,
    aligner_parts: tuple[str, ...],
) -> None:
    if len(counts) != num_pipeline_stages:
        raise ConfigError(
            f"parallel.pipeline_layout={text!r} has {len(counts)} pipeline stages, it must have "
            f"{num_pipeline_stages} (parallel.pipeline_model_parallel_size, times "
            "parallel.virtual_pipeline_model_parallel_size where that is set)"
        )
    if sum(counts) != num_layers:
        raise ConfigError(
            f"parallel.pipeline_layout={text!r} holds {sum(counts)} decoder layers, "
            f"model.decoder.num_layers is {num_layers}"
        )
    order = [part for pipeline_stage in parts for part in pipeline_stage]
    if order != list(aligner_parts):
        raise ConfigError(
            f"parallel.pipeline_layout={text!r} places AlignerNet's halves as {order}; this run "
            f"builds {list(aligner_parts)}, each once and in that order"
        )
    last_decoder = max(i for i, count in enumerate(counts) if count)
    first_half = min(
        (i for i, pipeline_stage in enumerate(parts) if pipeline_stage), default=num_pipeline_stages
    )
    if first_half < last_decoder:
        raise ConfigError(
            f"parallel.pipeline_layout={text!r} places AlignerNet before the decoder's end"
        )
    for pipeline_stage, count in enumerate(counts):
        if pipeline_stage > 0 and not count and not parts[pipeline_stage]:
            raise ConfigError(
                f"parallel.pipeline_layout={text!r}: pipeline stage {pipeline_stage} holds nothing "
                "that this run builds; give it decoder layers or a half of AlignerNet"
            )
