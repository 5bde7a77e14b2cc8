"""Which file a config is, what its relative paths mean, and how it drops what it includes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_kosmosg.checkpoint.changed_settings import check_resume
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.input_paths import CONFIGS, shipped_configs
from megatron_kosmosg.config.load import load_config, load_saved_config, to_yaml

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The current folder, which is not the repository."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_are_found_by_name_from_any_folder(name):
    config = load_config(name, [])
    assert config == load_config(REPOSITORY / "examples" / "configs" / f"{name}.yaml", [])
    if not name.endswith("gpu"):
        assert (Path(config.model.vision.path) / "config.json").is_file()
        assert Path(config.data.tokenizer_model).is_file()


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"did you mean toy_align\? shipped are .*toy_pretrain"):
        load_config("toy_algin", [])


def test_a_file_of_that_name_goes_before_a_shipped_config(elsewhere):
    (elsewhere / "toy_align").write_text("stage: align\nlogging: {output_dir: here}\n")
    assert load_config("toy_align", []).logging.output_dir == "here"


def test_inputs_are_looked_for_beside_the_file_and_then_in_the_current_folder(tmp_path, elsewhere):
    lab = tmp_path / "lab"
    (lab / "data").mkdir(parents=True)
    for name in ("beside.idx", "both.idx", "spm.model"):
        (lab / "data" / name).write_text("")
    (elsewhere / "data").mkdir()
    for name in ("both.idx", "here.idx"):
        (elsewhere / "data" / name).write_text("")
    (lab / "run.yaml").write_text(
        "stage: pretrain\n"
        "data:\n"
        "  tokenizer_model: data/spm.model\n"
        "  blend:\n"
        "    a: {path: data/beside, weight: 1}\n"
        "    b: {path: data/both, weight: 1}\n"
        "    c: {path: data/here, weight: 1}\n"
        "    d: {path: data/nowhere, weight: 1}\n"
        "logging: {output_dir: out}\n"
    )
    config = load_config(lab / "run.yaml", ["data.heldout.a.path=data/beside"])
    assert {name: entry.path for name, entry in config.data.blend.items()} == {
        "a": str(lab / "data" / "beside"),
        "b": str(lab / "data" / "both"),
        "c": "data/here",
        "d": "data/nowhere",
    }
    assert config.data.tokenizer_model == str(lab / "data" / "spm.model")
    # What is written, and what the command line says, belongs to the current folder.
    assert config.logging.output_dir == "out"
    assert config.data.heldout["a"].path == "data/beside"


def test_an_included_file_keeps_its_own_paths(tmp_path):
    shutil.copytree(CONFIGS, tmp_path / "base")
    (tmp_path / "base" / "spm.model").write_text("")
    (tmp_path / "base" / "mine.yaml").write_text(
        "include: toy_base.yaml\ndata: {tokenizer_model: spm.model}\n"
    )
    (tmp_path / "run.yaml").write_text(
        "include: base/mine.yaml\nstage: align\nlogging: {output_dir: out}\n"
    )
    config = load_config(tmp_path / "run.yaml", [])
    assert config.data.tokenizer_model == str(tmp_path / "base" / "spm.model")


def test_a_config_drops_what_it_includes(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "include: toy_instruct\ndata:\n  blend: {edit: null}\n  heldout: null\n"
    )
    config = load_config(tmp_path / "run.yaml", [])
    assert list(config.data.blend) == ["compositional", "caption"]
    assert config.data.heldout == {}
    again = load_config("toy_instruct", ["data.blend.edit=null", "data.heldout=null"])
    assert again == config


def test_dropping_what_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"data\.blend\.photos is null.* compositional, edit"):
        load_config("toy_instruct", ["data.blend.photos=null"])


@pytest.mark.parametrize(
    "asks",
    ["include: /etc/passwd", "logging: {output_dir: '${oc.env:HOME}'}", "stage: ${oc.env:HOME}"],
)
def test_a_saved_config_reads_neither_files_nor_the_environment(tmp_path, asks):
    (tmp_path / "config.yaml").write_text(f"{asks}\n")
    with pytest.raises(ConfigError, match="would read other files or the environment") as caught:
        load_saved_config(tmp_path / "config.yaml")
    assert "root:" not in str(caught.value)


def test_a_saved_config_reads_back_equal_from_another_folder(tmp_path):
    config = load_config("debug_instruct", [])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_saved_config(tmp_path / "config.yaml") == config


def test_a_run_goes_on_from_a_config_that_spelled_the_same_files_otherwise(tmp_path):
    """Earlier versions named the embedded files from the repository's root."""
    today = load_config("debug_align", [])
    (tmp_path / "old.yaml").write_text(
        to_yaml(today).replace(str(REPOSITORY / "megatron_kosmosg"), "megatron_kosmosg")
    )
    old = load_saved_config(tmp_path / "old.yaml")
    assert check_resume(old, today) == []
    moved = load_config("debug_align", [f"data.tokenizer_model={tmp_path}/other.model"])
    with pytest.raises(ConfigError, match=r"data\.tokenizer_model"):
        check_resume(moved, today)
