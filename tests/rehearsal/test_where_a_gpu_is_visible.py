"""What else runs where torch sees a GPU: the GPU tests' own code, the planner, the image grid."""

from __future__ import annotations

import pytest

from megatron_kosmosg.rehearsal.case import RehearsalCase
from tests.support.image_cases import needs_dali
from tests.support.rehearsals import Rehearsals


def task(rehearse: Rehearsals, stage: str, do: str, *overrides: str) -> RehearsalCase:
    return rehearse.tiny(stage, *overrides, do=f"tests.support.rehearsal_tasks:{do}")


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_the_code_of_the_gpu_tests_runs_on_the_device(rehearse, stage):
    answer = rehearse.answer(task(rehearse, stage, "gradients_of_a_stage"))
    assert isinstance(answer["loss"], float) and len(answer["gradients"]) > 20


@needs_dali
def test_the_gpu_test_of_images_that_compares_no_pixels_runs_on_the_device(rehearse):
    """With DALI's pipelines on the CPU; the others need pixels, which nothing has here."""
    answer = rehearse.answer(task(rehearse, "instruct", "a_gpu_test_of_images"))
    assert answer["good"] == ["cuda", 0]


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_the_planner_builds_its_models_without_the_device(rehearse, stage):
    assert rehearse.answer(task(rehearse, stage, "plan"))["trainable"] > 10_000


def test_held_out_images_are_drawn_on_the_device(rehearse):
    settings = ("logging.num_images=4", "logging.num_inference_steps=3")
    answer = rehearse.answer(task(rehearse, "instruct", "images", *settings))
    assert answer["shape"] == [4, 3, 16, 16] and answer["device"] == "cuda"
    # Guidance doubles the rows and not the passes: one of the U-Net a step.
    assert answer["phases"]["forward of the U-Net"]["kernels"]["convolution"] % 3 == 0


def test_apex_without_its_cuda_extensions_is_not_used(rehearse):
    report = rehearse.report(task(rehearse, "pretrain", "update_with_bare_apex"))
    assert report.kernels("forward") > 0 and report.kernels("backward") > 0
