"""A checkpoint of somebody else is data: whatever its files hold, nothing of it runs, and what it
claims beyond its own files is refused with one message."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_kosmosg.checkpoint.checkpoint_errors import load_state
from megatron_kosmosg.checkpoint.description import read_description
from megatron_kosmosg.checkpoint.plain_data import read_common
from megatron_kosmosg.config.errors import ConfigError, ConversionError
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from tests.support.ranks import run_ranks

RNG = "rng/shard_0_1"


class Touch:
    """Unpickled without restraint, makes a file: the harmless proof that code ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture
def checkpoint(past, tmp_path) -> Path:
    """A checkpoint that may be changed."""
    found = past / "runs" / "align" / "checkpoints" / "iter_0000003"
    return Path(shutil.copytree(found, tmp_path / "iter_0000003"))


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "code-ran"


def describe(checkpoint: Path, change: Callable[[Metadata], Any]) -> None:
    """Writes the description anew after `change`, or what `change` returns in its place."""
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(change(found) or found))


def first_record(found: Metadata) -> Any:
    return next(iter(found.storage_data))


def rerecord(found: Metadata, **changes: Any) -> None:
    key = first_record(found)
    found.storage_data[key] = dataclasses.replace(found.storage_data[key], **changes)


def grow(found: Metadata) -> None:
    stored = next(value for value in found.state_dict_metadata.values() if hasattr(value, "size"))
    stored.size = torch.Size([1 << 50])


def test_a_whole_checkpoint_is_described_as_torch_describes_it(checkpoint):
    stock = pickle.loads((checkpoint / ".metadata").read_bytes())
    own = read_description(checkpoint)
    assert own.state_dict_metadata == stock.state_dict_metadata
    assert own.storage_data == stock.storage_data and len(own.storage_data) > 100
    assert read_common(checkpoint)["progress"]["iteration"] == 3


@pytest.mark.parametrize("reader", [read_description, CheckpointTensors])
def test_a_description_that_names_a_function_is_refused_and_runs_nothing(checkpoint, mark, reader):
    (checkpoint / "complete.json").write_text('{"files": {}}')  # its maker makes the digests too
    describe(checkpoint, lambda found: setattr(found, "planner_data", Touch(mark)))
    with pytest.raises((ConfigError, ConversionError), match=r"names pathlib\.Path\.touch|getattr"):
        reader(checkpoint)
    assert not mark.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert mark.exists(), "the proof itself does not work"


def test_a_description_cannot_change_the_classes_it_is_made_of(checkpoint):
    # GLOBAL StorageMeta; BUILD with ({}, {"__init__": Metadata}) sets an attribute of the class.
    program = (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nStorageMeta\n"
        b"(}}\x8c\x08__init__ctorch.distributed.checkpoint.metadata\nMetadata\nstb."
    )
    before = StorageMeta.__init__
    (checkpoint / ".metadata").write_bytes(program)
    with pytest.raises(ConfigError, match="StorageMeta.__init__ to change it"):
        read_description(checkpoint)
    assert StorageMeta.__init__ is before


CLAIMS = {
    "outside": (lambda m: rerecord(m, relative_path="../secret"), "names a file outside"),
    "absolute": (lambda m: rerecord(m, relative_path="/etc/passwd"), "names a file outside"),
    "missing": (lambda m: rerecord(m, relative_path="__9_9.distcp"), "there is no file"),
    "long": (lambda m: rerecord(m, length=1 << 40), "lies outside"),
    "negative": (lambda m: rerecord(m, offset=-5), "lies outside"),
    "transformed": (lambda m: rerecord(m, transform_descriptors=["zstd"]), "is transformed"),
    "no record": (lambda m: m.storage_data.pop(first_record(m)) and None, "no record holds"),
    "no list": (lambda m: setattr(m, "storage_data", None), "without a list of records"),
    "no description": (lambda m: {"a": 1}, "it is a dict"),
    "huge": (grow, "hold .* of 1125899906842624 values"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_the_files_do_not_bear_out_is_refused(checkpoint, claim):
    (checkpoint.parent / "secret").write_bytes(bytes(1 << 20))
    change, message = CLAIMS[claim]
    describe(checkpoint, change)
    with pytest.raises(ConfigError, match=message):
        read_description(checkpoint)


def test_a_linked_file_of_tensors_is_refused(checkpoint):
    shard = checkpoint / "__0_0.distcp"
    shard.rename(checkpoint.parent / "elsewhere")
    shard.symlink_to(checkpoint.parent / "elsewhere")
    with pytest.raises(ConfigError, match="there is no file"):
        read_description(checkpoint)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04N.", b"\x80\x04]\x94(K\x01e"])
def test_a_damaged_description_is_one_message(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(ConfigError, match=r"\.metadata"):
        read_description(checkpoint)


def test_common_state_is_data_or_refused(checkpoint, mark, monkeypatch):
    # The variable that lets torch.load unpickle everything does not reach it.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    common = checkpoint / "common.pt"
    torch.save({"progress": Touch(mark)}, common)
    with pytest.raises(ConfigError, match=r"common\.pt cannot be read as plain data") as caught:
        read_common(checkpoint)
    assert not mark.exists() and "\n" not in str(caught.value)
    common.write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(ConfigError, match=r"common\.pt"):
        read_common(checkpoint)
    assert not mark.exists()


def test_common_state_that_unpacks_to_more_than_it_is_long_is_refused(checkpoint):
    common = checkpoint / "common.pt"
    torch.save({"zeros": torch.zeros(1 << 20)}, common)
    with zipfile.ZipFile(common) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(common, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert common.stat().st_size < 1 << 16
    with pytest.raises(ConfigError, match="bytes unpack to"):
        read_common(checkpoint)


def load_random_state(folder: Path) -> str:
    """What a rank that resumes is told, or the kinds of state it found."""
    dist.init_process_group("gloo")
    expected = {"rng": ShardedObject("rng", None, (1,), (0,))}
    try:
        return ", ".join(sorted(load_state(folder, expected)["rng"]))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.destroy_process_group()


def test_a_byte_record_among_the_tensors_runs_nothing_at_a_resume(checkpoint, mark):
    assert run_ranks(1, load_random_state, checkpoint) == ["device, numpy, python, torch, tracker"]
    program = io.BytesIO()
    torch.save({"python": Touch(mark)}, program)
    (checkpoint / "__0_0.distcp.crc32").unlink()
    shard = checkpoint / "__0_0.distcp"
    begin = shard.stat().st_size
    with shard.open("ab") as file:
        file.write(program.getvalue())

    def point_there(found: Metadata) -> None:
        key = next(key for key in found.storage_data if key.fqn == RNG)
        found.storage_data[key] = dataclasses.replace(
            found.storage_data[key], offset=begin, length=len(program.getvalue())
        )

    describe(checkpoint, point_there)
    (told,) = run_ranks(1, load_random_state, checkpoint)
    assert told.startswith("DamagedCheckpoint") and f"{RNG} is no plain data" in told, told
    assert not mark.exists()
