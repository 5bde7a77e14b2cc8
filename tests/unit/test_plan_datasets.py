"""Plans follow what a dataset is, not what it is called; what nobody says is assumed in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_kosmosg import exit_codes, train
from megatron_kosmosg.checkpoint.changed_settings import check_resume
from megatron_kosmosg.cli import plan as plan_command
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.rank_grid import rank_grid
from megatron_kosmosg.config.schema import BlendEntry, RunConfig
from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.manifest import Manifest, manifest_path
from megatron_kosmosg.parallel import platform
from megatron_kosmosg.planning.dry_run import dry_run_report
from megatron_kosmosg.planning.estimate import estimate
from megatron_kosmosg.planning.gpus import GPUS, Efficiency
from megatron_kosmosg.planning.model_counts import model_shares, whole_model
from megatron_kosmosg.planning.pipeline_balance import with_default_layout
from megatron_kosmosg.planning.plan import planned_config
from megatron_kosmosg.planning.workload import assumed_kinds, mixture, with_kinds

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
STAGES = (
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "training.micro_batch_size=1",
)
"""Of `pretrain`, for a split that depends on the kinds."""
OTHER_NAMES = {
    "text": "compositional",
    "caption": "laion",
    "interleaved": "text",
    "edit": "caption",
    "compositional": "a",
}
"""Some are the names of other kinds."""


def full_size(stage: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{stage}_256gpu.yaml", list(overrides))


def with_blend(config: RunConfig, blend: dict[str, BlendEntry]) -> RunConfig:
    return replace(config, data=replace(config.data, blend=blend))


def renamed(config: RunConfig) -> RunConfig:
    return with_blend(
        config, {OTHER_NAMES[name]: entry for name, entry in config.data.blend.items()}
    )


def without_kinds(config: RunConfig) -> RunConfig:
    blend = {name: replace(entry, kind=None) for name, entry in config.data.blend.items()}
    return with_blend(config, blend)


def write_dataset(prefix: Path, kind: str) -> None:
    """As far as a plan looks at it."""
    Path(f"{prefix}.bin").touch()
    Manifest(kind, "0", 1, 1, 1, 1, 0).write(manifest_path(prefix))


def on_disk(config: RunConfig, folder: Path) -> RunConfig:
    """Without kinds, each dataset lying in `folder`."""
    blend = {}
    for name, entry in config.data.blend.items():
        write_dataset(folder / name, entry.kind)
        blend[name] = replace(entry, path=str(folder / name), kind=None)
    return with_blend(config, blend)


def figures(config: RunConfig):
    """(pipeline split, FLOPs by module, samples a second) of its plan."""
    config = with_default_layout(with_kinds(config))
    shares = model_shares(config, whole_model(config))
    planned = estimate(config, rank_grid(config, 256), GPUS["h100-80"], Efficiency(), shares)
    speed = config.training.global_batch_size / planned.seconds
    return config.parallel.pipeline_layout, planned.flops, speed


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_other_names_leave_the_plan_as_it_is(stage, tmp_path):
    config = full_size(stage, *(STAGES if stage == "pretrain" else ()))
    named = figures(config)
    assert figures(renamed(config)) == named
    assert figures(renamed(on_disk(config, tmp_path))) == named


def test_the_shipped_plans_are_those_of_their_kinds():
    layout, flops, _ = figures(renamed(full_size("pretrain", *STAGES)))
    assert layout == "decoder*11|decoder*13"
    assert flops["vision"] == pytest.approx(977.186e12, rel=1e-6)
    _, _, speed = figures(renamed(full_size("instruct")))
    assert speed == pytest.approx(3090.938, rel=1e-6)


def test_training_takes_the_split_that_its_plan_shows(monkeypatch, tmp_path):
    """Both read the manifests; the config in the checkpoint stays as it was given."""
    output = f"logging.output_dir={tmp_path / 'out'}"
    config = on_disk(full_size("pretrain", *STAGES, output), tmp_path)
    config = with_blend(config, {"other": config.data.blend["text"]})
    split = with_default_layout(config).parallel.pipeline_layout
    assumed = with_default_layout(with_blend(config, {"other": BlendEntry("/nowhere")}))
    assert split != assumed.parallel.pipeline_layout
    assert f"  pipeline_layout: {split}\n" in dry_run_report(config)
    seen = []

    def stop_here(resolved) -> bool:
        seen.append(resolved)
        raise KeyboardInterrupt

    monkeypatch.setattr(platform, "holds_unet_alone", stop_here)
    assert train.run(config) == exit_codes.INTERRUPTED
    parallel = replace(config.parallel, pipeline_layout=split)
    assert seen == [replace(config, parallel=parallel)]


@pytest.mark.parametrize(
    ("stage", "assumed"),
    [("pretrain", "caption"), ("align", "caption"), ("instruct", "compositional")],
)
def test_an_unknown_kind_is_assumed_in_words_whatever_the_others_are_called(stage, assumed):
    config = full_size(stage)
    blend = {"x": BlendEntry("/nowhere/x"), **config.data.blend}
    for others in (blend, renamed(with_blend(config, dict(config.data.blend))).data.blend):
        unknown = with_blend(config, {"x": BlendEntry("/nowhere/x"), **others})
        (entry,) = [e for e in mixture(with_kinds(unknown)) if e.dataset == "x"]
        assert entry.kind == assumed
        _, (note,) = planned_config(unknown, 256, GPUS["h100-80"])
        for words in ("data.blend.x.kind", "/nowhere/x", assumed):
            assert words in note
        assert f"note: {note}" in dry_run_report(unknown)
    assert planned_config(config, 256, GPUS["h100-80"])[1] == []


def test_an_empty_blend_is_assumed_too():
    (note,) = assumed_kinds(with_blend(full_size("instruct"), {}))
    assert "data.blend is empty" in note and "compositional" in note


def test_a_token_dataset_without_manifest_is_text(tmp_path):
    (tmp_path / "corpus.bin").touch()
    config = with_blend(full_size("pretrain"), {"c": BlendEntry(str(tmp_path / "corpus"))})
    assert [entry.kind for entry in mixture(with_kinds(config))] == ["text"]


def test_a_kind_that_contradicts_the_manifest_is_an_error(monkeypatch, tmp_path, capsys):
    write_dataset(tmp_path / "x", "edit")
    settings = [f"data.blend.caption.path={tmp_path / 'x'}"]
    with pytest.raises(ConfigError, match=r"data\.blend\.caption\.kind=caption.* is of kind edit"):
        with_kinds(full_size("instruct", *settings))
    arguments = ["--config", str(CONFIGS / "instruct_256gpu.yaml"), "--gpu", "h100-80"]
    monkeypatch.setattr("sys.argv", ["plan", *arguments, *settings])
    assert plan_command.main() == 2
    assert "data.blend.caption.kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "kind"),
    [("pretrain", "edit"), ("align", "text"), ("instruct", "interleaved"), ("instruct", "captoin")],
)
def test_a_kind_that_the_stage_does_not_read_is_an_error(stage, kind):
    config = with_blend(full_size(stage), {"y": BlendEntry("/nowhere", kind=kind)})
    with pytest.raises(ConfigError, match=rf"data\.blend\.y is of kind {kind}; {stage} reads "):
        mixture(config)


def test_a_broken_manifest_is_an_error_that_names_it(tmp_path):
    (tmp_path / "x.json").write_text("{")
    config = with_blend(full_size("pretrain"), {"y": BlendEntry(str(tmp_path / "x"))})
    with pytest.raises(ConfigError, match=r"data\.blend\.y\.path.*x\.json is not a readable"):
        with_kinds(config)


def test_every_kind_has_a_stage_that_reads_it():
    stages = ("pretrain", "align", "instruct")
    assert all(any(kind.use(stage) for stage in stages) for kind in KINDS.values())


def test_a_resumed_run_may_state_kinds():
    config = full_size("pretrain")
    noted = check_resume(without_kinds(config), config)
    assert "data.blend.text.kind: None -> text" in noted
