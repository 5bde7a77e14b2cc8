"""Outputs, losses and gradients equal those of the authors' released code on every layout.

Every quantity may differ by 1e-5 of its largest entry. One kind of gradient has no digits to
compare, that of the key biases; `test_key_biases_have_no_gradient` proves it and bounds ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.score.keyed_noise import RandomKey
from tests.support.authors_files import load_golden
from tests.support.denoising_reference import denoising_errors
from tests.support.float64_reference import UNUSED, Reference
from tests.support.golden_case import Numbers, error, errors, golden_config
from tests.support.golden_stages import (
    denoising_loss,
    instruct_batches,
    instruct_config,
    numbers_on_a_rank,
)
from tests.support.ranks import run_ranks
from tests.support.tiny_models import write_stable_diffusion

TOLERANCE = 1e-5
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}
KEY_BIAS = "k_proj.bias"
PARTS = {"align": "align_grads", "diff": "diff_grads"}


@dataclass(frozen=True)
class File:
    """A golden file and what float64 makes of it."""

    index: int
    golden: dict
    stable_diffusion: str
    exact: dict[str, dict[str, torch.Tensor]]
    """Gradients by the authors' names: of "align", "diff" and "instruct"."""
    exact_outputs: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module", params=[1, 2])
def file(request, stable_diffusion) -> File:
    torch.set_num_threads(1)
    golden = load_golden(request.param)
    exact, outputs = in_float64(golden, stable_diffusion)
    return File(request.param, golden, stable_diffusion, exact, outputs)


@pytest.fixture(scope="module")
def numbers_of(file):
    """Our numbers on the layout of the given name; each layout runs once per file."""
    known = {}

    def compute(layout: str) -> Numbers:
        if layout not in known:
            world_size, parallel = LAYOUTS[layout]
            answers = run_ranks(
                world_size,
                numbers_on_a_rank,
                file.index,
                parallel,
                file.stable_diffusion,
                timeout=300,
            )
            known[layout] = Numbers(file.golden, golden_config(file.golden, "align", {}), answers)
        return known[layout]

    return compute


def in_float64(golden: dict, stable_diffusion) -> tuple[dict, dict]:
    """(gradients, outputs) of the reference for the three losses."""
    inputs, padding = golden["inputs"], golden["inputs"]["tokens"] == 1
    reference = Reference(golden["model"], golden["sizes"])
    hidden, features = reference.hidden(inputs["tokens"], inputs["image_slots"], inputs["images"])
    condition = reference.condition(hidden, padding)
    outputs = {"image_features": features.flatten(0, 1), "hidden": hidden, "condition": condition}

    target = hidden.detach()
    rebuilt = reference.reconstruction(reference.condition(target, padding), hidden.shape[1])
    outputs["mse_loss"] = (condition - inputs["clip_embed"]).square().mean()
    outputs["rec_loss"] = 77 / hidden.shape[1] * (rebuilt - target).square().mean()
    gradients = {"align": _gradients(reference, outputs["mse_loss"] + outputs["rec_loss"])}
    outputs["diff_loss"] = denoising_loss(golden, condition)
    gradients["diff"] = _gradients(reference, outputs["diff_loss"])
    outputs["instruct_loss"] = instruct_loss(golden, reference, condition, stable_diffusion)
    gradients["instruct"] = _gradients(reference, outputs["instruct_loss"])
    return gradients, {name: value.detach() for name, value in outputs.items()}


def _gradients(reference: Reference, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = reference.parameters
    found = torch.autograd.grad(
        loss, list(leaves.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def instruct_loss(golden: dict, reference: Reference, condition, stable_diffusion) -> torch.Tensor:
    """Mean over the global batch's images of what `instruct` minimises, `<s>` run by itself."""
    start = torch.zeros(1, 1, dtype=torch.long)
    null_hidden, _ = reference.hidden(start, start.bool(), None)
    null_condition = reference.condition(null_hidden, start.bool())
    config = instruct_config(golden, {}, stable_diffusion)
    losses = []
    for batch in instruct_batches(golden):
        drop = dropped_rows(config, batch)
        mixed = torch.where(drop[:, None, None], null_condition, condition)
        per_image, _ = denoising_errors(
            stable_diffusion,
            config.training.seed,
            mixed,
            batch["target_pixel_values"],
            batch["stream_positions"],
        )
        losses.append(per_image)
    return torch.cat(losses).mean()


def dropped_rows(config: RunConfig, batch: dict) -> torch.Tensor:
    """bool [b], True = the row draws with the null condition."""
    chance = RandomKey(config.training.seed, "instruct").uniform(
        batch["stream_positions"], "condition_drop"
    )
    return chance < config.score.condition_drop_prob


def _assert_small(found: dict[str, float]) -> None:
    wrong = {name: f"{value:.1e}" for name, value in found.items() if not value <= TOLERANCE}
    assert not wrong, f"off by more than {TOLERANCE} of the largest entry: {wrong}"


def test_float64_reference_is_the_authors_model(file) -> None:
    """Stock Kosmos2 and the plain AlignerNet give the golden numbers, so they can stand in for
    them where the golden files have none."""
    expected = file.golden["outputs"]
    names = expected.keys() & file.exact_outputs.keys()
    assert len(names) == 6
    _assert_small({name: error(file.exact_outputs[name], expected[name]) for name in names})
    for part, key in PARTS.items():
        of_authors = _with_digits(expected[key])
        _assert_small(errors({name: file.exact[part][name] for name in of_authors}, of_authors))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_losses(file, numbers_of, layout: str) -> None:
    expected, numbers = file.golden["outputs"], numbers_of(layout)
    logits = numbers.output("diff", "logits").transpose(0, 1)
    size = file.golden["vocab_size"]
    assert torch.all(logits[..., size:] == float("-inf"))
    _assert_small(
        {
            "image_features": error(numbers.image_features(), expected["image_features"]),
            "logits": error(logits[..., :size], expected["logits"]),
            "hidden": error(numbers.output("diff", "hidden"), expected["hidden"]),
            "condition": error(numbers.output("align", "condition"), expected["condition"]),
            "mse_loss": error(numbers.output("align", "mse_loss"), expected["mse_loss"]),
            "rec_loss": error(numbers.output("align", "rec_loss"), expected["rec_loss"]),
            "diff_loss": error(numbers.output("diff", "diff_loss"), expected["diff_loss"]),
        }
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(file, numbers_of, layout: str, part: str) -> None:
    expected = _with_digits(file.golden["outputs"][PARTS[part]])
    _assert_small(errors(numbers_of(layout).gradients(part, expected), expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_key_biases_have_no_gradient(file, numbers_of, layout: str) -> None:
    """A constant added to all keys moves all scores of a query alike, which softmax ignores.

    So the exact gradient of every key bias is zero. In float64 it is below 1e-12 of the key
    weight's, and what the golden files hold for it is float32 round-off from end to end; a bound
    relative to that would compare noise with noise. Ours must be zero to 1e-5 of the gradient of
    the key weight, as theirs is.
    """
    for part in (*PARTS, "instruct"):
        exact = file.exact[part]
        trained = (
            file.golden["outputs"][PARTS[part]] if part in PARTS else _trained_in_instruct(file)
        )
        names = [name for name in trained if name.endswith(KEY_BIAS)]
        found = numbers_of(layout).gradients(part, names)
        assert names
        for name in names:
            scale = float(exact[name.replace("bias", "weight")].abs().max())
            assert exact[name].abs().max() < 1e-12 * scale
            assert found[name].abs().max() < TOLERANCE * scale, name
            if part in PARTS:
                assert trained[name].abs().max() < TOLERANCE * scale, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_instruct_gradients_equal_the_float64_reference(file, numbers_of, layout: str) -> None:
    """The real stage with keyed noise and dropped conditions: every parameter that it trains,
    among them those without golden numbers (M, the last CLIP block, ln_post, all through the null
    row too); two micro-batches, so that the mean is over the global batch."""
    config = instruct_config(file.golden, {}, file.stable_diffusion)
    drops = torch.cat([dropped_rows(config, batch) for batch in instruct_batches(file.golden)])
    assert 0 < drops.sum() < len(drops)
    numbers = numbers_of(layout)
    loss = sum(numbers.output("instruct", "loss", index) for index in range(2))
    assert loss[1] == len(drops)
    assert error(loss[0] / loss[1], file.exact_outputs["instruct_loss"]) < TOLERANCE
    names = _with_digits(dict.fromkeys(_trained_in_instruct(file)))
    expected = {name: file.exact["instruct"][name] for name in names}
    _assert_small(errors(numbers.gradients("instruct", names), expected))


def _with_digits(of_authors: dict) -> dict:
    return {k: v for k, v in of_authors.items() if k not in UNUSED and not k.endswith(KEY_BIAS)}


def _trained_in_instruct(file: File) -> list[str]:
    last_block = f"img_model.visual.transformer.resblocks.{file.golden['sizes']['vis_layers'] - 1}."
    trained = (
        "gpt_model.",
        "img_connector.",
        "aligner.encoder",
        last_block,
        "img_model.visual.ln_post.",
    )
    names = [n for n in file.golden["model"] if n.startswith(trained) and n not in UNUSED]
    assert len([n for n in names if n.startswith(last_block)]) == 16
    return names
