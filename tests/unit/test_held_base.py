"""Which folder counts as the base of a checkpoint of trained weights, and which links to one are
kept: whatever became of the base's own folder, no save leaves out weights that nobody has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_kosmosg.checkpoint.base_checkpoint import base_is_there, find_base, hold_base
from megatron_kosmosg.checkpoint.base_record import Base, checkpoint_fingerprint, write_base
from megatron_kosmosg.checkpoint.folder import begin, damage, finish, write_checksum
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.paths import COMPLETE_FILE


def checkpoint(save: Path, iteration: int, content: str, base: Base | None = None) -> Path:
    save.mkdir(parents=True, exist_ok=True)
    folder = begin(save, iteration)
    for rank in (0, 1):
        file = folder / f"__{rank}_0.distcp"
        file.write_text(content * 100)
        write_checksum(file)
    (folder / ".metadata").write_text("metadata")
    if base is not None:
        write_base(folder, base)
    return finish(folder, "a: 1\n")


def base_of(folder: Path) -> Base:
    return Base(str(folder.resolve()), checkpoint_fingerprint(folder), {"weight": "bfloat16"})


@pytest.fixture
def save(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_a_base_that_was_written_anew_is_not_there_and_not_held(tmp_path, save):
    """Its own run repeated the iteration after this one had read it."""
    base = base_of(checkpoint(tmp_path / "base-run", 100, "old"))
    assert base_is_there(save, base)
    checkpoint(tmp_path / "base-run", 100, "new")
    assert not base_is_there(save, base)
    with pytest.raises(ConfigError, match="another one now"):
        hold_base(save, base)
    assert not list(save.iterdir())


def test_a_base_without_its_files_is_not_there(tmp_path, save):
    folder = checkpoint(tmp_path / "base-run", 100, "old")
    base = base_of(folder)
    hold_base(save, base)
    for file in folder.glob("*.distcp"):
        file.unlink()
    assert base_is_there(save, base), "it is held"
    (held,) = (save / "base").iterdir()
    for file in held.glob("*.distcp"):
        file.unlink()
    assert not base_is_there(save, base)


@pytest.mark.parametrize("text", ["", "{}", '{"files": 3}', '{"files": {"../../x": 1}}'])
def test_a_base_whose_list_cannot_be_read_is_not_there(tmp_path, save, text):
    folder = checkpoint(tmp_path / "base-run", 100, "old")
    base = base_of(folder)
    (folder / COMPLETE_FILE).write_text(text)
    assert not base_is_there(save, base)
    with pytest.raises(ConfigError):
        hold_base(save, base)
    assert not list(save.iterdir())


def test_a_checkpoint_that_an_archive_holds_finds_its_base_beside_the_link(tmp_path, save):
    base = base_of(checkpoint(tmp_path / "base-run", 100, "old"))
    hold_base(save, base)
    made = checkpoint(save, 10, "own", base)
    shutil.rmtree(tmp_path / "base-run")
    (tmp_path / "archive").mkdir()
    made.rename(tmp_path / "archive" / made.name)
    made.symlink_to(tmp_path / "archive" / made.name)
    assert find_base(made, base) == (save / "base" / base.fingerprint)


def test_a_base_s_own_base_is_held_with_it(tmp_path, save):
    first = base_of(checkpoint(tmp_path / "first-run", 1, "first"))
    second = base_of(checkpoint(tmp_path / "second-run", 2, "second", first))
    hold_base(tmp_path / "second-run", first)
    shutil.rmtree(tmp_path / "first-run")
    hold_base(save, second)
    shutil.rmtree(tmp_path / "second-run")
    made = checkpoint(save, 3, "own", second)
    held = find_base(made, second)
    assert damage(held) is None and damage(find_base(held, first)) is None
