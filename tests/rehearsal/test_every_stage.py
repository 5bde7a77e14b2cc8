"""Every stage and kind of layout makes an update on device "cuda" without a wrong device, dtype,
shape or buffer of a collective."""

from __future__ import annotations

import pytest

from tests.support.rehearsals import Report

STAGES = ("pretrain", "align", "instruct")


def trained(report: Report) -> bool:
    return report.kernels("forward") > 0 and report.kernels("backward") > 0


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank(rehearse, stage):
    assert trained(rehearse.report(rehearse.repeated(stage)))


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_of_two_that_split_the_tensors_and_the_sequence(rehearse, stage):
    report = rehearse.report(rehearse.tiny(stage, tp=2))
    assert trained(report)
    # Each of the decoder's two layers gathers the sequence twice and scatters it twice.
    scattered = report.phase("forward")["collectives"][
        "reduce_scatter over TENSOR_MODEL_PARALLEL_GROUP of 2"
    ]
    assert scattered["calls"] == 2 * 2


@pytest.mark.parametrize("stage", STAGES)
def test_both_of_two_pipeline_stages(rehearse, stage):
    case = rehearse.tiny(stage, pp=2)
    first, behind = rehearse.report(case), rehearse.report(rehearse.behind(case, case))
    if stage == "align":  # nothing trains before AlignerNet, which is on the last pipeline stage
        assert first.kernels("forward") > 0
    else:
        assert trained(first)
    assert trained(behind)
    group = "PIPELINE_MODEL_PARALLEL_GROUP of 2"
    for report in (first, behind):
        traffic = report.phase("exchange")["collectives"]
        # Two micro-batches; the shape goes before the tensor, from host to host.
        shapes = {"calls": 2, "num_bytes": 2 * 24}
        for way in ("send", "receive"):
            assert traffic[f"{way} over {group}"]["calls"] == 2
            assert traffic[f"{way} over pipeline of hosts of 2"] == shapes
    forward, backward = (
        report.phase("exchange")["collectives"][f"send over {group}"]["num_bytes"]
        for report in (first, behind)
    )
    assert forward == backward


def test_a_decoder_rank_whose_unet_is_elsewhere(rehearse):
    case = rehearse.tiny(
        "instruct",
        "score.placement=dedicated",
        "score.ranks_per_replica=2",
        tp=2,
        world_size=4,
    )
    report = rehearse.report(case)
    assert trained(report)
    assert "forward of the U-Net" not in report.answer["phases"]


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("pretrain", ["training.recompute=full"]),
        (
            "instruct",
            ["score.recompute=true", "training.precision=fp16", "data.latent_cache=latents"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_settings(rehearse, stage, settings):
    assert trained(rehearse.report(rehearse.tiny(stage, *settings)))


def test_replicas_that_reduce_and_gather_while_they_compute_also_without_images(rehearse):
    """Megatron-Core refuses to end an update in which a parameter's gradient never came."""
    overlap = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    report = rehearse.report(rehearse.repeated("pretrain", *overlap, world_size=2, images=0))
    group = "DATA_PARALLEL_GROUP_WITH_CP of 2"
    assert f"all_gather over {group}" in report.phase("forward")["collectives"]
    assert f"reduce_scatter over {group}" in report.phase("backward")["collectives"]
