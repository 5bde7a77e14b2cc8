"""The table of evaluators: each entry is what the contract says, and a wrong name is answered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_kosmosg import exit_codes, train
from megatron_kosmosg.checkpoint.changed_settings import check_resume
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import EvaluationConfig, RunConfig
from megatron_kosmosg.evaluation.evaluator import DrawnImages, measure
from megatron_kosmosg.evaluation.registry import EVALUATORS, build_evaluators
from megatron_kosmosg.toy.world import render_batch, sample_scene


class Brightness:
    """An evaluator of a file of its own."""

    def __init__(self, config: RunConfig) -> None:
        self._scale = config.logging.guidance_scale

    def run(self, images: DrawnImages) -> Iterator[tuple[str, float]]:
        yield "results", self._scale * images.results.mean().item()
        yield "targets", self._scale * images.targets.mean().item()


def config_of(*names: str) -> RunConfig:
    return RunConfig(evaluation=EvaluationConfig(grid=list(names)))


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_entry_measures_images(name):
    scenes = render_batch(
        [sample_scene((5, i), 1, heldout=False) for i in range(2)]
    )  # all that `toy` measures
    found = measure(build_evaluators(config_of(name)), DrawnImages(scenes, scenes))
    assert found and all(metric.startswith(f"{name}_") for metric in found)
    assert all(isinstance(value, float) for value in found.values())


def test_a_new_evaluator_is_an_entry_and_nothing_else(monkeypatch):
    monkeypatch.setitem(EVALUATORS, "brightness", f"{__name__}:Brightness")
    evaluators = build_evaluators(config_of("brightness"))
    images = DrawnImages(torch.full((1, 3, 2, 2), 0.5), torch.full((1, 3, 2, 2), -1.0))
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
        "error: evaluation.grid names 'quite_other', which is no evaluator; there are toy"
    )


@pytest.mark.parametrize("stage", ["pretrain", "align"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_stage_that_draws_nothing_has_no_evaluators(stage, more, capsys):
    settings = ["--config", f"toy_{stage}", "evaluation.grid=[toy]", "parallel.world_size=1"]
    assert train.main([*settings, *more]) == exit_codes.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: evaluation.grid=[toy] means nothing to stage={stage}: ")


def test_a_run_may_go_on_with_other_evaluators():
    saved = load_config("toy_instruct", ["evaluation.grid=[]"])
    (noted,) = check_resume(saved, load_config("toy_instruct", []))
    assert noted.startswith("evaluation.grid: ")
