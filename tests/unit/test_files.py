"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import threading

import pytest

from megatron_kosmosg.files import exclusive, replacing, write_json, write_text


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
