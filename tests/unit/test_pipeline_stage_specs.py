"""Reading `parallel.pipeline_layout`."""

from __future__ import annotations

import pytest

from megatron_kosmosg import exit_codes
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.schema import DecoderConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_kosmosg.models.pipeline_stage_specs import PipelineStageSpec, pipeline_stage_specs
from megatron_kosmosg.train import main


def _specs(num_layers: int, pp_size: int, layout: str | None, parts: tuple[str, ...], virtual=None):
    config = RunConfig(
        stage="align",
        model=ModelConfig(decoder=DecoderConfig(num_layers=num_layers)),
        parallel=ParallelConfig(
            pipeline_model_parallel_size=pp_size,
            virtual_pipeline_model_parallel_size=virtual,
            pipeline_layout=layout,
        ),
    )
    return pipeline_stage_specs(config, parts)


def test_default_spreads_layers_and_puts_the_aligner_last() -> None:
    assert _specs(5, 2, None, ("M", "N")) == [
        PipelineStageSpec(0, 3, False, ()),
        PipelineStageSpec(3, 2, True, ("M", "N")),
    ]


def test_uneven_layout_with_the_aligner_on_stages_of_its_own() -> None:
    assert _specs(24, 4, "decoder*13 | decoder*11 | M | N", ("M", "N")) == [
        PipelineStageSpec(0, 13, False, ()),
        PipelineStageSpec(13, 11, True, ()),
        PipelineStageSpec(24, 0, False, ("M",)),
        PipelineStageSpec(24, 0, False, ("N",)),
    ]


def test_first_stage_may_hold_the_embedding_alone() -> None:
    assert _specs(3, 2, "|decoder*3", ())[0] == PipelineStageSpec(0, 0, False, ())


def test_half_that_is_not_built_is_skipped() -> None:
    assert _specs(3, 2, "decoder*2|decoder,M,N", ("M",))[1].aligner_parts == ("M",)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("decoder*2|decoder|M", "3 pipeline stages"),
        ("decoder*2|decoder*2,M", "4 decoder layers"),
        ("decoder*2|decoder,X", "'X' is not a piece"),
        ("decoder,M|decoder*2", "before the decoder's end"),
        ("decoder*2,M|decoder,M", r"\['M', 'M'\]"),
        ("decoder*3|N", r"places AlignerNet's halves as \[\]"),
    ],
)
def test_unusable_layouts_are_named(layout: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _specs(3, 2, layout, ("M",))


def test_interleaved_ranks_hold_several_stages_each() -> None:
    """3 ranks x 2 chunks: rank 0 holds stages 0 and 3, and so on."""
    pieces = _specs(8, 3, None, ("M",), virtual=2)
    assert [piece.num_decoder_layers for piece in pieces] == [2, 2, 1, 1, 1, 1]
    assert [piece.aligner_parts for piece in pieces] == [()] * 5 + [("M",)]
    with pytest.raises(ConfigError, match="has 3 pipeline stages, it must have 6"):
        _specs(8, 3, "decoder*3|decoder*3|decoder*2,M", ("M",), virtual=2)


def test_a_run_with_an_unusable_layout_ends_before_it_starts(capsys) -> None:
    layout = "parallel.pipeline_layout=decoder|decoder"
    settings = ["stage=pretrain", "logging.output_dir=x", layout]
    assert main(settings) == exit_codes.BAD_INPUT
    assert "has 2 pipeline stages, it must have 1" in capsys.readouterr().err


def test_stage_that_would_hold_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match="pipeline stage 1 holds nothing"):
        _specs(3, 2, "decoder*3|N", ())
