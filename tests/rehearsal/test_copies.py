"""Batches reach the device from pinned memory, and images as bytes."""

from __future__ import annotations

import pytest

TOKEN_BYTES = 8
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
