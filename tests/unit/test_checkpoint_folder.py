"""Checkpoint folders: only whole ones have a final name, and only whole ones are found."""

from __future__ import annotations

import os

import pytest

from megatron_kosmosg.checkpoint import folder as folders
from megatron_kosmosg.checkpoint.base_record import (
    Base,
    checkpoint_fingerprint,
    read_base,
    write_base,
)
from megatron_kosmosg.config.errors import ConfigError


def save(root, iteration: int, content: bytes = b"weights"):
    temporary = folders.begin(root, iteration)
    (temporary / "part").mkdir()
    (temporary / "part" / "a.bin").write_bytes(content)
    return folders.finish(temporary, "stage: align\n")


def test_a_finished_save_is_found_and_an_unfinished_one_is_not(tmp_path):
    first = save(tmp_path, 5)
    assert first.name == "iter_0000005" and folders.is_valid(first)
    assert (first / "config.yaml").read_text() == "stage: align\n"
    unfinished = folders.begin(tmp_path, 10)
    (unfinished / "a.bin").write_bytes(b"half")
    assert folders.latest_valid(tmp_path) == first
    assert folders.begin(tmp_path, 11).exists() and not unfinished.exists()


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "no listing"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, damage):
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    if damage == "truncate":
        os.truncate(newest / "part" / "a.bin", 3)
    elif damage == "change":
        (newest / "part" / "a.bin").write_bytes(b"Weights")
    elif damage == "remove":
        (newest / "part" / "a.bin").unlink()
    else:
        (newest / "complete.json").write_text("{")
    assert folders.latest_valid(tmp_path) == older
    (line,) = folders.damages(tmp_path, newer_than=older)
    assert str(newest) in line and ("complete.json" if damage == "no listing" else "a.bin") in line
    assert folders.latest_valid(tmp_path, older_than=older) is None
    folders.set_aside(newest)
    assert folders.damages(tmp_path) == [] and folders.latest_valid(tmp_path) == older


def test_changed_tensors_are_found_by_whoever_reads_their_share(tmp_path):
    for name in ("a.distcp", "b.distcp", "c.distcp"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    for name in ("a.distcp", "b.distcp"):
        folders.write_checksum(tmp_path / name)
    assert folders.damaged_tensors(tmp_path, 0, 1) == []
    for name in ("b.distcp", "c.distcp"):  # c is of before there were checksums
        (tmp_path / name).write_bytes(b"b.distcp" * 99 + b"b.disctp")
    (line,) = folders.damaged_tensors(tmp_path, 1, 2)
    assert "b.distcp" in line and folders.damaged_tensors(tmp_path, 0, 2) == []


def test_order_is_by_iteration_not_by_digits(tmp_path):
    save(tmp_path, 9_999_999)
    newest = save(tmp_path, 10_000_000)
    assert folders.latest_valid(tmp_path) == newest


def test_saving_an_iteration_again_replaces_it(tmp_path):
    save(tmp_path, 3, b"old")
    again = save(tmp_path, 3, b"newer")
    assert (again / "part" / "a.bin").read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000003"]


def test_pruning_keeps_the_newest_whole_ones(tmp_path):
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration)
    os.truncate(tmp_path / "iter_0000004" / "part" / "a.bin", 0)
    folders.prune(tmp_path, keep_last=2)
    assert {path.name for path in tmp_path.iterdir()} == {f"iter_000000{i}" for i in (2, 3, 4)}
    folders.prune(tmp_path, keep_last=0)
    assert len(list(tmp_path.iterdir())) == 3


def test_pruning_keeps_every_so_many_iterations(tmp_path):
    for iteration in range(1, 10):
        save(tmp_path, iteration)
    folders.prune(tmp_path, keep_last=1, keep_every=4)
    assert {path.name for path in tmp_path.iterdir()} == {f"iter_000000{i}" for i in (4, 8, 9)}


def test_pruning_spares_what_kept_checkpoints_take_weights_from(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", 1)
    bases = {2: elsewhere, 4: "iter_0000002", 5: "iter_0000001", 6: "iter_0000004"}
    for iteration in range(1, 7):
        temporary = folders.begin(tmp_path, iteration)
        if iteration in bases:
            write_base(temporary, Base(str(tmp_path / bases[iteration]), "0a1b", {"w": "float32"}))
        folders.finish(temporary, "stage: instruct\n")
    folders.prune(tmp_path, keep_last=1)
    assert {path.name[-1] for path in tmp_path.glob("iter_*")} == {"2", "4", "6"}
    assert folders.is_valid(elsewhere)


@pytest.mark.parametrize("text", ["{", "[]", '{"path": "a", "fingerprint": "b"}'])
def test_a_record_of_a_base_that_is_none_is_refused(text, tmp_path):
    assert read_base(tmp_path) is None
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(ConfigError, match="base.json is damaged"):
        read_base(tmp_path)


def test_a_fingerprint_is_of_tensors_alone_and_of_their_checksums_where_they_have_some(tmp_path):
    found = {}
    for name, content, other, has_checksum in (
        ("one", b"weights", "a", False),
        ("same", b"weights", "b", False),
        ("changed", b"Weights", "a", False),
        ("summed", b"weights", "a", True),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "0.distcp").write_bytes(content)
        (folder / "config.yaml").write_text(other)
        if has_checksum:
            folders.write_checksum(folder / "0.distcp")
        found[name] = checkpoint_fingerprint(folder)
    assert found["one"] == found["same"] and len(set(found.values())) == 3
    (tmp_path / "summed" / "0.distcp").write_bytes(b"what training would notice by its checksum")
    assert checkpoint_fingerprint(tmp_path / "summed") == found["summed"]


def test_a_run_folder_a_checkpoint_folder_and_an_iteration_all_name_the_same(tmp_path):
    expected = save(tmp_path / "checkpoints", 7)
    for path in (tmp_path, tmp_path / "checkpoints", expected):
        assert folders.find_checkpoint(path) == expected
    with pytest.raises(ConfigError, match="checkpoint.load"):
        folders.find_checkpoint(tmp_path / "elsewhere")
    os.truncate(expected / "part" / "a.bin", 0)
    with pytest.raises(ConfigError, match="damaged"):
        folders.find_checkpoint(expected)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        ({"config.json": '{"model_type": "kosmos-2"}'}, "convert import-kosmos2 --input"),
        ({"model_index.json": "{}", "mllm/config.json": "{}"}, "convert import-hf --input"),
        ({"model_index.json": "{}", "unet/config.json": "{}"}, "model.diffusion.path takes it"),
    ],
)
def test_a_folder_of_another_format_is_answered_with_the_command_that_imports_it(
    tmp_path, files, advice
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="no finished checkpoint") as caught:
        folders.find_checkpoint(tmp_path)
    assert advice in str(caught.value)


def test_a_file_of_the_authors_is_answered_with_its_import(tmp_path):
    (tmp_path / "final.pt").touch()
    with pytest.raises(ConfigError, match="convert import-fairseq --input"):
        folders.find_checkpoint(tmp_path / "final.pt")


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "[1]", "{", None])
def test_a_folder_that_no_command_imports_gets_no_advice(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        folders.find_checkpoint(tmp_path)
    assert "kosmosg convert" not in str(caught.value)
