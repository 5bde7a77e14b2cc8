"""Files that appear whole or not at all, and under their own names alone."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from megatron_kosmosg.checkpoint import folder as checkpoint_folder
from megatron_kosmosg.data.latent_cache import LatentWriter
from megatron_kosmosg.files import (
    exclusive,
    new_folder,
    open_itself,
    real_folder,
    remove,
    remove_folder,
    replacing,
    write_json,
    write_text,
)
from megatron_kosmosg.preprocess.work_folder import WorkFolder


def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": 1})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_planted_link_is_replaced_and_its_target_is_not_written_to(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    path = tmp_path / "report.txt"
    path.symlink_to(outside)
    write_text(path, "ours")
    assert outside.read_text() == "theirs" and path.read_text() == "ours"
    assert not path.is_symlink()


def test_the_only_writer_replaces_what_a_killed_process_left(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    (tmp_path / "a.json.tmp").symlink_to(outside)
    write_json(tmp_path / "a.json", [1], only_writer=True)
    assert outside.read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "outside"]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def files_in(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("only_writer", [False, True])
def test_a_folder_appears_when_it_is_whole_and_replaces_the_one_before(tmp_path, only_writer):
    path = tmp_path / "deep" / "folder"
    for text in ("first", "second"):
        with new_folder(path, only_writer=only_writer, replaces=True) as temporary:
            assert temporary.parent == path.parent and not list(temporary.iterdir())
            (temporary / "a").write_text(text)
            assert not path.exists() or files_in(path) == {"a": "first"}
        assert files_in(path.parent) == {"folder/a": text}


@pytest.mark.parametrize("only_writer", [False, True])
def test_a_folder_that_fails_half_way_leaves_what_was_there(tmp_path, only_writer):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with new_folder(tmp_path / "folder", only_writer=only_writer, replaces=True) as temporary:
            (temporary / "half").write_text("half")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert files_in(tmp_path) == {"folder/old": "old"}


def test_of_two_processes_that_build_one_folder_the_first_wins(tmp_path):
    with pytest.raises(FileExistsError, match="is already there"):
        with new_folder(tmp_path / "folder") as late:
            with new_folder(tmp_path / "folder") as early:
                assert early != late
                (early / "a").write_text("early")
            (late / "a").write_text("late")
    assert files_in(tmp_path) == {"folder/a": "early"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_links_in_the_way_of_a_folder_are_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs").write_text("theirs")
    for name in ("folder", "folder.tmp", "folder.old.tmp"):
        (tmp_path / name).symlink_to(outside)
    with new_folder(tmp_path / "folder", only_writer=True, replaces=True) as temporary:
        assert not temporary.is_symlink()
        (temporary / "a").write_text("ours")
    assert files_in(tmp_path) == {"folder/a": "ours", "outside/theirs": "theirs"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "outside"]
    (tmp_path / "link").symlink_to(outside)
    remove_folder(tmp_path / "link")
    assert files_in(outside) == {"theirs": "theirs"} and not (tmp_path / "link").is_symlink()


def test_what_a_killed_only_writer_left_is_replaced(tmp_path):
    for name in ("folder.tmp", "folder.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    (tmp_path / "folder").mkdir()
    with new_folder(tmp_path / "folder", only_writer=True, replaces=True) as temporary:
        (temporary / "a").write_text("whole")
    assert files_in(tmp_path) == {"folder/a": "whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_one_at_a_time_is_inside_a_lock(tmp_path):
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with exclusive(tmp_path / "deep" / "lock"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and (tmp_path / "deep" / "lock").exists()


def test_a_file_system_without_locks_lets_everyone_in_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*arguments: object, **named: object) -> None:
        raise NotImplementedError("no locks here")

    monkeypatch.setattr("megatron_kosmosg.files.FileLock.acquire", refuse)
    with exclusive(tmp_path / "lock"):
        pass
    assert "cannot be locked (no locks here)" in caplog.text


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A file of somebody else in a folder of theirs."""
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "file"
    path.write_text("theirs")
    return path


@pytest.mark.parametrize("mode", ["a", "ab", "r+b", "wb", "xb"])
def test_a_file_under_its_own_name_alone_is_opened(tmp_path, theirs, mode):
    # c9c3073 opened metrics.jsonl, commands.log, the quickstart's lock and a cache under way
    # through a link: appended to, emptied or cut to another length was what the link led to.
    (tmp_path / "link").symlink_to(theirs)
    with pytest.raises(OSError, match="link|exists"):
        open_itself(tmp_path / "link", mode)
    assert theirs.read_text() == "theirs"


def test_a_lock_is_not_taken_through_a_link(tmp_path, theirs):
    # c9c3073 left that to the lock's library, of which some versions empty the file.
    (tmp_path / "lock").symlink_to(theirs)
    with pytest.raises(OSError, match="is a link"), exclusive(tmp_path / "lock"):
        pass
    assert theirs.read_text() == "theirs"


def test_a_folder_whose_files_are_deleted_is_no_link(tmp_path, theirs):
    (tmp_path / "link").symlink_to(theirs.parent)
    with pytest.raises(OSError, match="is a link"):
        real_folder(tmp_path / "link")
    remove(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and theirs.read_text() == "theirs"


def test_unfinished_shards_are_not_kept_behind_a_link(tmp_path, theirs):
    # c9c3073 deleted all files of the link's target.
    prefix = tmp_path / "data"
    (tmp_path / ".data.partial").symlink_to(theirs.parent)
    for resume in (False, True):
        with pytest.raises(OSError, match="is a link"):
            WorkFolder(prefix).open({"kind": "text"}, resume)
    assert theirs.read_text() == "theirs"


def test_a_shard_that_is_a_link_is_not_resumed_from(tmp_path, theirs):
    job = {"kind": "text"}
    folder = WorkFolder(tmp_path / "data")
    folder.open(job, resume=False)
    folder.close()
    (folder.path / "00000000.bin").symlink_to(theirs)
    with pytest.raises(OSError, match="is a link"):
        WorkFolder(tmp_path / "data").open(job, resume=True)
    anew = WorkFolder(tmp_path / "data")
    anew.open(job, resume=False)
    anew.remove()
    assert theirs.read_text() == "theirs" and not folder.path.exists()


def test_a_save_removes_a_link_among_its_left_overs_and_nothing_behind_it(tmp_path, theirs):
    # c9c3073 ended the run with `Cannot call rmtree on a symbolic link`.
    for name in ("iter_0000007.tmp", "iter_0000008.tmp"):
        (tmp_path / name).symlink_to(theirs.parent)
    begun = checkpoint_folder.begin(tmp_path, 7)
    assert begun.is_dir() and not begun.is_symlink()
    assert theirs.read_text() == "theirs"


def test_moments_are_not_written_through_a_link(tmp_path, theirs):
    # c9c3073 cut the link's target to the length of the cache.
    (tmp_path / "data.latents.partial.bin").symlink_to(theirs)
    with pytest.raises(OSError, match="is a link"):
        LatentWriter(str(tmp_path / "data.latents"), (2, 1, 1, 1), 3)
    assert theirs.read_text() == "theirs"
