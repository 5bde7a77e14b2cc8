"""Batches reach the device from pinned memory, and images as bytes."""

from __future__ import annotations

import pytest

from tests.support.image_cases import needs_dali

TOKEN_BYTES = 8
PIXELS = 3 * 2 * 28**2
"""Of the prompt images of a tiny micro-batch."""
VALUES = 3 * (2 * 28**2 + 2 * 16**2)
"""Of the pixels of a tiny micro-batch: two prompt images, two targets."""


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_no_copy_to_the_device_is_from_pageable_memory(rehearse, stage):
    assert rehearse.report(rehearse.repeated(stage)).of_a_micro_batch("pageable") == {}


def test_a_pixel_travels_as_one_byte(rehearse):
    report = rehearse.report(rehearse.repeated("instruct"))
    uploaded = report.phase("forward")["uploaded"] / report.answer["num_micro_batches"]
    noise = 3 * 2 * 4 * 8**2 * 4  # posterior's and epsilon's draws are made on the CPU
    assert uploaded <= VALUES + noise + 2 * 13 * 3 * TOKEN_BYTES


@needs_dali
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("do", "read"),
    [("update_with_decoded_images", ["cuda", 0]), ("update_with_a_bad_image", ["cpu", 1])],
)
def test_images_that_dali_decodes_on_the_device_stay_there(rehearse, do, read, tp):
    """Where one of them is bad, those of its micro-batch travel with the rest, pinned."""
    case = rehearse.tiny("instruct", tp=tp, do=f"tests.support.rehearsal_tasks:{do}")
    report = rehearse.report(case)
    num_micro_batches = report.answer["num_micro_batches"]
    assert report.answer["read"] == [read] * num_micro_batches
    assert report.of_a_micro_batch("pageable") == {}
    made_up = rehearse.report(rehearse.tiny("instruct", tp=tp)).phase("forward")["uploaded"]
    stayed = made_up - report.phase("forward")["uploaded"]
    assert stayed == (num_micro_batches * PIXELS if read[0] == "cuda" else 0)
