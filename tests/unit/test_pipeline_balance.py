"""The default of parallel.pipeline_layout against all others."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kosmosg import exit_codes, train
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.config.schema import BlendEntry
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.models.pipeline_stage_specs import pipeline_stage_specs
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.parallel.fake_world import pretend_rank
from megatron_kosmosg.planning.dry_run import dry_run_report
from megatron_kosmosg.planning.pipeline_balance import with_default_layout
from megatron_kosmosg.planning.pipeline_stage_cost import pipeline_stage_work, score_work
from megatron_kosmosg.planning.workload import micro_batches
from megatron_kosmosg.stages import stage_facts

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def config_of(stage: str, pp: int, *overrides: str):
    return load_config(
        CONFIGS / f"{stage}_256gpu.yaml",
        [f"parallel.pipeline_model_parallel_size={pp}", *overrides],
    )


def slowest(config, layout: str) -> float:
    """FLOPs of the busiest pipeline stage."""
    config = replace(config, parallel=replace(config.parallel, pipeline_layout=layout))
    (batch,) = micro_batches(config, 1)
    loads = []
    specs = pipeline_stage_specs(config, stage_facts(config.stage).aligner_parts)
    for index, spec in enumerate(specs):
        is_last = index == len(specs) - 1
        work = pipeline_stage_work(config, spec, is_last, batch)
        if is_last and config.stage == "instruct" and config.score.placement == "colocated":
            tp = config.parallel.tensor_model_parallel_size
            work = work + score_work(config, -(-batch.images // tp))
        loads.append(sum(w.forward + w.backward for w in work))
    return max(loads)


@pytest.mark.parametrize(
    ("stage", "pp", "overrides"),
    [
        ("pretrain", 2, ()),
        ("pretrain", 4, ()),
        ("align", 2, ()),
        ("align", 3, ()),
        ("instruct", 2, ("score.placement=colocated", "model.diffusion.path=null")),
        ("instruct", 4, ("score.placement=colocated", "model.diffusion.path=null")),
        ("instruct", 4, ()),
    ],
)
def test_no_split_of_the_layers_has_a_faster_slowest_pipeline_stage(stage, pp, overrides):
    config = config_of(stage, pp, *overrides)
    chosen = with_default_layout(config).parallel.pipeline_layout
    tail = "".join(f",{part}" for part in stage_facts(stage).aligner_parts)
    others = []
    for cuts in itertools.combinations(range(1, 24), pp - 1):
        counts = [b - a for a, b in zip((0, *cuts), (*cuts, 24), strict=True)]
        others.append("|".join(f"decoder*{count}" for count in counts) + tail)
    if tail:  # AlignerNet alone on the last pipeline stage
        for cuts in itertools.combinations(range(1, 24), pp - 2):
            counts = [b - a for a, b in zip((0, *cuts), (*cuts, 24), strict=True)]
            others.append("|".join([*(f"decoder*{count}" for count in counts), tail[1:]]))
    best = min(slowest(config, layout) for layout in others)
    print(chosen, slowest(config, chosen), best)
    assert slowest(config, chosen) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("kind", "fewer"), [("text", 1), ("caption", 0)])
def test_the_stage_with_more_beside_its_layers_gets_fewer(kind, fewer):
    """The output head costs as much as 2.6 layers; the image tower of captions far more."""
    config = config_of("pretrain", 2)
    data = replace(config.data, blend={"x": BlendEntry("x", kind=kind)})
    layout = with_default_layout(replace(config, data=data)).parallel.pipeline_layout
    counts = [int(piece.removeprefix("decoder*")) for piece in layout.split("|")]
    assert sum(counts) == 24 and counts[fewer] < counts[1 - fewer]


def test_a_named_layout_and_a_single_stage_are_left_alone():
    named = config_of("align", 2, "parallel.pipeline_layout=decoder*24|M,N")
    assert with_default_layout(named) is named
    single = config_of("align", 1)
    assert with_default_layout(single) is single


def test_training_and_its_dry_run_take_the_default(monkeypatch, tmp_path):
    config = config_of("pretrain", 2, f"logging.output_dir={tmp_path}")
    expected = with_default_layout(config).parallel.pipeline_layout
    assert f"  pipeline_layout: {expected}\n" in dry_run_report(config)
    seen = []

    def stop_here(resolved) -> bool:
        seen.append(resolved.parallel.pipeline_layout)
        raise KeyboardInterrupt

    monkeypatch.setattr(platform, "holds_unet_alone", stop_here)
    assert train.run(config) == exit_codes.INTERRUPTED
    assert seen == [expected]


def test_the_model_is_built_as_the_layout_says_with_the_aligner_on_a_stage_of_its_own():
    config = config_of(
        "align", 4, "parallel.pipeline_layout=decoder*13|decoder*11|M|N",
        "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
    )  # fmt: skip
    world = rank_grid(config, 8)
    held = []
    for pipeline_stage in range(4):
        with pretend_rank(world, world.decoder_rank(0, pipeline_stage, 0)) as layout:
            model = KosmosG(config, layout, output_head=False, aligner_parts=("M", "N"))
        layers = 0 if model.decoder is None else len(model.decoder.layers)
        held.append((layers, model.aligner_m is not None, model.aligner_n is not None))
    assert held == [(13, False, False), (11, False, False), (0, True, False), (0, False, True)]
