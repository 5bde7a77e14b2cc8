"""What the device is asked to launch: counts that may only fall, and launches for nothing."""

from __future__ import annotations

import re

import pytest

from megatron_kosmosg.rehearsal.case import RehearsalCase
from tests.support.rehearsals import Rehearsals

MOST = {
    "instruct": {
        "forward": 1254,
        "forward of the U-Net": 673,
        "backward": 2233,
        "backward of the U-Net": 695,
        "update": 356,
    },
    "pretrain": {"forward": 739, "backward": 1054, "update": 273},
}
"""{stage at full size: {phase: kernels of a micro-batch, or of an update}}, as they are today;
megatron-core 0.16.1 has two fewer in an update than 0.19.2."""
MATRIX_PRODUCTS = ("mm", "addmm", "bmm")


def instruct(rehearse: Rehearsals) -> RehearsalCase:
    """The 256-GPU run with a U-Net beside every decoder: four prompts with six images."""
    return rehearse.full("instruct", micro_batch=4, length=215, images=6)


def pretrain(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full("pretrain", micro_batch=1, length=2048, images=20)


def align(rehearse: Rehearsals) -> RehearsalCase:
    return rehearse.full("align", micro_batch=14, length=40, images=0)


CASES = {"instruct": instruct, "pretrain": pretrain}


@pytest.mark.parametrize(
    ("stage", "phase"), [(stage, phase) for stage in MOST for phase in MOST[stage]]
)
def test_kernels_do_not_become_more(rehearse, stage, phase):
    assert rehearse.report(CASES[stage](rehearse)).kernels(phase) <= MOST[stage][phase]


def test_no_kernel_multiplies_or_divides_by_one(rehearse):
    assert rehearse.report(instruct(rehearse)).of_a_micro_batch("without_effect") == {}


@pytest.mark.parametrize(("case", "calls", "share"), [(instruct, 24, 1e-3), (align, 24, 1e-2)])
def test_attention_without_flash_for_its_mask_is_alignernet_s_and_small(
    rehearse, case, calls, share
):
    """Of two rows of different lengths no kernel but THD's would need no mask; a mask costs these
    calls flash attention and not the memory-efficient kernel."""
    report = rehearse.report(case(rehearse))
    attention = report.attention()
    masked = {x: count for x, count in attention["efficient"].items() if "mask (" in x}
    assert sum(masked.values()) == calls and sum(attention["flash"].values()) >= 24
    phases = report.answer["phases"].items()
    forward = sum(phase["flops"] for name, phase in phases if name.startswith("forward"))
    assert sum(products(x) * count for x, count in masked.items()) <= share * forward


def products(shape: str) -> int:
    """FLOPs of an attention's forward pass, from "(b, heads, sq, hn) x sk, ..."."""
    rows, heads, queries, width, keys = map(int, re.findall(r"\d+", shape)[:5])
    return 4 * rows * heads * queries * keys * width


def test_heads_are_too_wide_for_flash_in_the_vae_alone(rehearse):
    attention = rehearse.report(instruct(rehearse)).attention()
    unmasked = [shape for shape in attention["efficient"] if "no mask" in shape]
    assert len(unmasked) == 1 and unmasked[0].startswith("(4, 1, 4096, 512)")
    assert set(attention) == {"flash", "efficient"}


def test_masks_are_built_once(rehearse):
    inverted = rehearse.report(instruct(rehearse)).phase("forward")["kernels"]["bitwise_not"]
    assert inverted <= 2


def test_a_micro_batch_without_images_multiplies_no_empty_matrices(rehearse):
    report = rehearse.report(rehearse.repeated("align"))
    empty = report.of_a_micro_batch("empty")
    products = [place for place in empty if place.startswith(MATRIX_PRODUCTS)]
    assert products == [] and "empty" not in report.attention()


def test_logits_are_not_copied_to_float32(rehearse):
    """Some positions at a time are, 256 MiB, for the loss and for its gradient."""
    settings = ("training.recompute=full", "optimizer.ema_decay=0.9999")  # a case of another test
    case = rehearse.full("pretrain", *settings, micro_batch=4, length=2048, images=4 * 20)
    report, logits = rehearse.report(case), 4 * 2048 * 64128
    assert report.phase("forward")["largest"]["bytes"] == logits * 2
    assert report.phase("backward")["largest"]["bytes"] <= 2**26 * 4


def test_the_feed_forward_makes_no_float32_copy(rehearse):
    """GELU of half precision computes in float32 by itself."""
    copies = rehearse.report(instruct(rehearse)).phase("forward")["kernels"]["_to_copy"]
    assert copies < 24


def test_an_operator_with_one_kernel_on_a_gpu_is_one(rehearse):
    """A torch without CUDA has seven for the gradient of SiLU."""
    kernels = rehearse.report(instruct(rehearse)).phase("backward of the U-Net")["kernels"]
    assert kernels["silu_backward"] == 43 and "sigmoid" not in kernels
