"""Finished shards are kept, other settings are refused, and nothing half done counts."""

from __future__ import annotations

import os
import pickle

import pytest

from megatron_kosmosg import files
from megatron_kosmosg.launcher import RankInfo
from megatron_kosmosg.shards import ShardFolder

SETTINGS = {"limit": None, "inputs": ["a", 1], "--dtype": "fp32"}


@pytest.fixture
def folder(tmp_path) -> ShardFolder:
    folder = ShardFolder(tmp_path / "parts", advice="start anew")
    folder.begin(SETTINGS)
    return folder


def test_a_restart_leaves_out_what_is_finished_with_any_number_of_ranks(folder):
    assert folder.to_do(RankInfo(1, 2, 1).share(6)) == [1, 3, 5]
    for number in (1, 4):
        folder.finish(number, {"bad": [number]})
    again = ShardFolder(folder.path)
    again.begin(SETTINGS)
    left = [again.to_do(RankInfo(rank, 3, rank).share(6)) for rank in range(3)]
    assert left == [[0, 3], [], [2, 5]]
    assert again.read(4) == {"bad": [4]} and again.is_done(1) and not again.is_done(2)


def test_a_shard_whose_mark_was_not_finished_is_to_be_done(folder, monkeypatch):
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "replace", dies)
        folder.finish(0, {})
    assert folder.to_do(range(1)) == [0]


def test_other_settings_are_refused_and_named(folder):
    with pytest.raises(ValueError, match=r"parts was begun with other settings \(limit: None -> 3"):
        folder.begin(SETTINGS | {"limit": 3})
    with pytest.raises(ValueError, match=r"\(--precision: fp32 -> bf16\); start anew$"):
        folder.begin(SETTINGS | {"--dtype": "bf16"}, {"--dtype": "--precision"})
    with pytest.raises(ValueError, match=r"settings \(inputs\); start"):
        folder.begin(SETTINGS | {"inputs": ["x" * 1000]})
    with pytest.raises(ValueError, match="--dtype: fp32 -> None"):
        folder.begin({name: SETTINGS[name] for name in ("limit", "inputs")})
    with pytest.raises(ValueError, match="more: None -> 1"):
        folder.begin(SETTINGS | {"more": 1})
    folder.begin({"limit": None, "inputs": ("a", 1), "--dtype": "fp32"})


@pytest.mark.parametrize("deletion", ["clear", "remove"])
def test_what_a_killed_deletion_leaves_does_not_count(folder, monkeypatch, deletion):
    """A mark whose other files are gone would stand for a shard of nothing."""
    for number in range(5):
        folder.finish(number, {})
    unlink, left = os.unlink, 3

    def dies(*arguments: object, **options: object) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        unlink(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", dies)
        getattr(folder, deletion)()
    assert left == 0 and not folder.is_begun
    assert folder.path.exists() == (deletion == "clear")
    folder.path.mkdir(exist_ok=True)
    folder.clear()
    folder.begin({"other": 1})
    assert folder.to_do(range(5)) == list(range(5))
    folder.remove()
    assert not list(folder.path.parent.iterdir())


def test_what_is_to_be_kept_is_kept(folder):
    (folder.path / "lock").touch()
    folder.finish(3, {})
    folder.clear(keep=["lock"])
    assert [path.name for path in folder.path.iterdir()] == ["lock"]
    folder.remove()
    assert not folder.path.exists()


def test_a_worker_process_gets_the_folder(folder):
    other = pickle.loads(pickle.dumps(folder))
    other.finish(2, 5)
    assert folder.read(2) == 5


@pytest.mark.parametrize(
    ("made", "names"),
    [
        ("preprocess", ["00000002.counts.json", "job.json", "lock"]),
        ("construction", ["000002.jsonl", "lock", "settings.json"]),
    ],
)
def test_names_are_those_of_folders_that_earlier_runs_left(tmp_path, made, names):
    if made == "preprocess":
        from megatron_kosmosg.preprocess.work_folder import WorkFolder

        work = WorkFolder(tmp_path / "out")
        work.open({"kind": "text"}, resume=False)
        work.shards.finish(2, {})
        work.close()
        folder = tmp_path / ".out.partial"
    else:
        from megatron_kosmosg.construction.step_rows import StepFolder

        step = StepFolder(tmp_path, "captions")
        step.begin({"made by": "input"})
        step.write(2, [{"key": "a"}])
        folder = tmp_path / "captions"
    assert sorted(path.name for path in folder.iterdir()) == names
