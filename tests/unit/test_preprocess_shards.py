"""`preprocess --shard-gib`: shards hold the joined dataset's samples, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.data.manifest import Manifest
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.preprocess import input_files, join, preprocess_run, sharded
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, TooManyRejects, preprocess
from megatron_kosmosg.preprocess.shards_of_dataset import check_shards
from megatron_kosmosg.preprocess.work_folder import WorkFolder
from tests.support.data_helpers import image_records, write_jsonl, write_tokenizer

GIB = 2**30


class Killed(BaseException):
    """Stands for the end of the process at this very place."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four small files, and a large one with a key that is doubled over a long distance."""
    folder = tmp_path_factory.mktemp("preprocess-shards")
    write_tokenizer(folder)
    for number, count in enumerate((3, 2, 20, 1, 2)):
        records = image_records(folder / "in", "caption", count, seed=number)
        if count == 20:
            records[17]["key"] = records[1]["key"]
        records.append({"key": "bad", "image": "images/none.png", "caption": "x"})
        write_jsonl(folder / "in" / f"{number}.jsonl", records)
    return folder


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch):
    """Work is cut as that on large files is."""
    monkeypatch.setattr(input_files, "MAX_RECORDS", 4)


def job(folder: Path, prefix: Path, shard_bytes: float | None, **more) -> PreprocessJob:
    shard_gib = None if shard_bytes is None else shard_bytes / GIB
    inputs, model = (str(folder / "in" / "*.jsonl"),), str(folder / "spm.model")
    return PreprocessJob("caption", inputs, model, str(prefix), shard_gib=shard_gib, **more)


def quiet(work: PreprocessJob) -> None:
    preprocess(work, lambda *_: None)


def everything(prefix: Path) -> dict[str, bytes]:
    files = [*prefix.parent.glob(f"{prefix.name}.*"), *sharded.shards_folder(prefix).iterdir()]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def test_shards_are_the_joined_dataset_cut_in_pieces(folder, tmp_path):
    quiet(job(folder, tmp_path / "joined", None))
    size = (folder / "in" / "0.jsonl").stat().st_size
    sizes = {}
    for name, shard_bytes, workers in (("all", 2 * size, 1), ("other", 2 * size, 3)):
        quiet(job(folder, tmp_path / name, shard_bytes, workers=workers))
        store = SampleStore(tmp_path / name)
        sizes[name] = [entry.num_samples for entry in store.shards.entries]
        assert store.fingerprint() == SampleStore(tmp_path / "joined").fingerprint()
        assert all(found.problem is None for found in check_shards(str(tmp_path / name)))
        rejects = [tmp_path / f"{which}.rejects.jsonl" for which in (name, "joined")]
        lines = [sorted(path.read_text().splitlines()) for path in rejects]
        assert lines[0] == lines[1]
        assert "duplicate key" in rejects[0].read_text()
    one, other = everything(tmp_path / "all"), everything(tmp_path / "other")
    assert {name.replace("all", "") for name in one} == {n.replace("other", "") for n in other}
    assert all(one[name] == other[name] for name in one if name.startswith("0"))
    # Files 0 and 1 together, the large one in parts, then 3 and 4; nothing was left behind.
    assert sizes["all"][0] == 5 and sizes["all"][-1] == 3 and sum(sizes["all"]) == 27
    assert len(sizes["all"]) > 4 and sizes["all"] == sizes["other"]
    assert not list(tmp_path.glob(".*.partial"))
    counts = [Manifest.read(tmp_path / f"{name}.json") for name in ("joined", "all")]
    assert counts[0].num_rejects == counts[1].num_rejects == 6
    assert sum(m.num_rejects for m in manifests(tmp_path / "all")) == 6


def manifests(prefix: Path) -> list[Manifest]:
    return [Manifest.read(path) for path in sorted(sharded.shards_folder(prefix).glob("*.json"))]


STEPS = [
    (preprocess_run, "work_on_shard", 2),
    (sharded, "_finish", 2),
    (sharded, "write_tables", 1),
    (sharded.os, "replace", 3),
    (sharded, "mark_joined", 0),
    (sharded, "_move_into_place", 0),
    (sharded, "remove_folder", 0),
    (Path, "rename", 0),
    (WorkFolder, "remove", 0),
]


@pytest.mark.parametrize(("owner", "name", "calls"), STEPS)
def test_killed_at_any_step_it_goes_on(folder, tmp_path, monkeypatch, owner, name, calls):
    work = job(folder, tmp_path / "all", 800, resume=True)
    quiet(job(folder, tmp_path / "all", 800))
    expected = everything(tmp_path / "all")
    original, left = getattr(owner, name), calls

    def dies(*arguments, **more):
        nonlocal left
        if name in ("replace", "rename") and "shards" not in str(arguments[1]):
            return original(*arguments, **more)
        if left == 0:
            raise Killed
        left -= 1
        return original(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            quiet(work)
    assert (tmp_path / ".all.partial").exists()
    quiet(work)  # over the finished dataset of that name
    assert everything(tmp_path / "all") == expected
    assert not (tmp_path / ".all.partial").exists()


def test_one_form_does_not_take_the_place_of_the_other(folder, tmp_path):
    quiet(job(folder, tmp_path / "joined", None))
    with pytest.raises(InputError, match="is a dataset in one piece; leave out --shard-gib"):
        quiet(job(folder, tmp_path / "joined", 100))
    quiet(job(folder, tmp_path / "all", 1000))
    with pytest.raises(InputError, match="is a dataset in shards; give --shard-gib"):
        quiet(job(folder, tmp_path / "all", None))
    (tmp_path / "new.shards").mkdir()
    with pytest.raises(InputError, match="lists no shards; delete that folder"):
        quiet(job(folder, tmp_path / "new", 1000))
    with pytest.raises(TooManyRejects, match="6 records rejected"):
        quiet(job(folder, tmp_path / "few", 1000, max_rejects=5))
    assert not (tmp_path / "few.json").exists() and not (tmp_path / "few.shards").exists()
    with pytest.raises(ValueError, match=r"--shard-gib: .* -> "):
        quiet(job(folder, tmp_path / "few", 2000, resume=True))


def test_no_byte_of_a_shard_without_duplicates_is_copied(folder, tmp_path, monkeypatch):
    copied = []
    monkeypatch.setattr(sharded, "copy_runs", lambda *a: copied.append(a) or join.copy_runs(*a))
    quiet(job(folder, tmp_path / "all", 800))
    assert len(copied) == 1  # the one with the doubled key
