"""The table of evaluators: each entry is what the contract says, and a wrong name is answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_kosmosg import exit_codes, train
from megatron_kosmosg.checkpoint.changed_settings import check_resume
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import EvaluationConfig, RunConfig
from megatron_kosmosg.evaluation.evaluator import GeneratedImages, measure
from megatron_kosmosg.evaluation.networks import find_clip, find_dino, open_network
from megatron_kosmosg.evaluation.preprocessing import clip_pixels, dino_pixels
from megatron_kosmosg.evaluation.registry import EVALUATORS, build_evaluators
from megatron_kosmosg.toy.stand_in_networks import write_clip, write_dino
from megatron_kosmosg.toy.world import render_batch, sample_scene
from tests.support.evaluated_images import odd_images


class Brightness:
    """An evaluator of a file of its own."""

    def __init__(self, config: RunConfig) -> None:
        self._scale = config.logging.guidance_scale

    def run(self, images: GeneratedImages) -> Iterator[tuple[str, float]]:
        yield "results", self._scale * images.results.mean().item()
        yield "targets", self._scale * images.targets.mean().item()


def config_of(*names: str, **files: str) -> RunConfig:
    return RunConfig(evaluation=EvaluationConfig(grid=list(names), **files))


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    return {"dino": str(write_dino(folder / "x.pth")), "clip": str(write_clip(folder / "clip"))}


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_entry_measures_images(name, networks):
    scenes = render_batch(
        [sample_scene((5, i), 1, heldout=False) for i in range(2)]
    )  # all that `toy` measures
    found = measure(build_evaluators(config_of(name, **networks)), GeneratedImages(scenes, scenes))
    assert found and all(metric.startswith(f"{name}_") for metric in found)
    assert all(isinstance(value, float) for value in found.values())


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_resemblance_is_that_of_the_commands(name, networks):
    (find, rule) = {"dino": (find_dino, dino_pixels), "clip": (find_clip, clip_pixels)}[name]
    images = odd_images(6)[5].resize((64, 48)), odd_images(6, seed=9)[5].resize((64, 48))
    pixels = [
        torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1 for image in images
    ]
    found = measure(build_evaluators(config_of(name, **networks)), GeneratedImages(*pixels))
    network = open_network(find(Path(networks[name])), torch.device("cpu"))
    features = network.features(torch.stack([rule(image) for image in images]))
    expected = torch.cosine_similarity(features[0], features[1], dim=0)
    assert found == {f"{name}_similarity": pytest.approx(float(expected), abs=1e-6)}
    assert expected < 0.999


def test_words_are_compared_with_images_as_the_command_does(networks):
    """Over the texts that CLIP can read whole; nothing is said where there are none."""
    images = odd_images(6)[5].resize((64, 48)), odd_images(6, seed=9)[5].resize((64, 48))
    pixels = torch.cat(
        [torch.from_numpy(np.array(each)).permute(2, 0, 1)[None] / 127.5 - 1 for each in images]
    )
    evaluators = build_evaluators(config_of("clip", **networks))
    texts = ("a red circle", "a blue square " * 90)
    found = measure(evaluators, GeneratedImages(pixels, pixels, texts))
    network = open_network(find_clip(Path(networks["clip"])), torch.device("cpu"))
    image = network.features(torch.stack([clip_pixels(images[0])]))
    expected = torch.cosine_similarity(image, network.text_features(texts[:1]))
    assert found["clip_text_similarity"] == pytest.approx(float(expected), abs=1e-6)
    for none in ((), (None, None), (None, texts[1])):
        found = measure(evaluators, GeneratedImages(pixels, pixels, none))
        assert set(found) == {"clip_similarity"}


@pytest.mark.parametrize("files", [{}, {"dino": "/nowhere/x.pth"}])
def test_an_evaluator_without_its_weights_is_refused_at_once(files):
    with pytest.raises(ConfigError, match=r"names dino, and evaluation.dino=.* is not there"):
        build_evaluators(config_of("dino", **files))


def test_a_new_evaluator_is_an_entry_and_nothing_else(monkeypatch):
    monkeypatch.setitem(EVALUATORS, "brightness", f"{__name__}:Brightness")
    evaluators = build_evaluators(config_of("brightness"))
    images = GeneratedImages(torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), -1.0))
    assert measure(evaluators, images) == {"brightness_results": 3.0, "brightness_targets": -6.0}
    assert list(build_evaluators(config_of("toy", "brightness"))) == ["toy", "brightness"]
    assert build_evaluators(config_of()) == {}


def test_a_name_that_is_in_no_table_is_answered_with_the_nearest(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"evaluation\.grid names 'tyo'.*did you mean toy\?"):
        build_evaluators(config_of("toy", "tyo"))
    settings = ["stage=align", f"logging.output_dir={tmp_path}", "evaluation.grid=[quite_other]"]
    assert train.main([*settings, "--dry-run"]) == exit_codes.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: evaluation.grid names 'quite_other', which is no evaluator; "
        "there are toy, dino, clip"
    )


@pytest.mark.parametrize("stage", ["pretrain", "align"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_stage_that_draws_nothing_has_no_evaluators(stage, more, capsys):
    settings = ["--config", f"toy_{stage}", "evaluation.grid=[toy]", "parallel.world_size=1"]
    assert train.main([*settings, *more]) == exit_codes.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: evaluation.grid=[toy] means nothing to stage={stage}: ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["evaluation.every=5", "evaluation.grid=[]"], "measures nothing without evaluators"),
        (["evaluation.every=-1"], "evaluation.every=-1 must not be negative"),
        (["evaluation.num_prompts=0"], "evaluation.num_prompts=0 must be at least 1"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused(settings, words, capsys):
    arguments = ["--config", "toy_instruct", *settings, "parallel.world_size=1", "--dry-run"]
    assert train.main(arguments) == exit_codes.BAD_INPUT
    assert words in capsys.readouterr().err


def test_a_run_may_go_on_with_other_evaluators():
    saved = load_config("toy_instruct", ["evaluation.grid=[]"])
    (noted,) = check_resume(saved, load_config("toy_instruct", []))
    assert noted.startswith("evaluation.grid: ")
