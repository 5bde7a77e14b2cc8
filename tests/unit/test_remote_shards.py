"""Shards whose .bin lies in object storage: the local dataset's samples and streams, in one request
a sample; what may not be read, is not there or does not answer is said, and is no bad image.

Long because reading, noting and each failure are looked at on the same shards.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megatron_kosmosg import exit_codes
from megatron_kosmosg.cli import dataset_shards as command
from megatron_kosmosg.config.dataset_prefixes import missing_files, remote_urls
from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.remote_data import VARIABLE
from megatron_kosmosg.data import remote_file
from megatron_kosmosg.data.index_file import write_index
from megatron_kosmosg.data.manifest import Manifest
from megatron_kosmosg.data.remote_file import StorageError
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.streams import align_stream, instruct_stream, pretrain_stream
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.inspection.check import check_dataset
from megatron_kosmosg.monitoring.failure import exit_code_of, report_failure
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess
from megatron_kosmosg.preprocess.shards_of_dataset import check_shards, list_shards
from tests.support.bucket import Bucket, Ranges
from tests.support.data_helpers import (
    image_records,
    run_config,
    text_records,
    write_clip_tokenizer,
    write_jsonl,
    write_tokenizer,
)
from tests.support.stream_rows import GLOBAL_BATCH, global_stream

KINDS = ("text", "caption", "interleaved", "edit")
SIZES = (7, 12)
"""Samples of the shards."""


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    """The protocol bucket://, of which nothing is kept, and no time to wait."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    remote_file._file_system_of.cache_clear()
    monkeypatch.setattr(Bucket, "requests", [])
    monkeypatch.setattr(Bucket, "failures", [])
    monkeypatch.setattr(remote_file, "WAITS", (0.0, 0.0))
    monkeypatch.delenv(VARIABLE, raising=False)
    return Bucket


@pytest.fixture
def allow(monkeypatch):
    return lambda *folders: monkeypatch.setenv(VARIABLE, " ".join(map(str, folders)))


def written(folder: Path, kind: str, name: str) -> str:
    """A list of shards of the kind."""
    source, first, prefixes = folder / f"source-{kind}", 0, []
    records = text_records(sum(SIZES)) if kind == "text" else None
    records = records or image_records(source, kind, sum(SIZES))
    (folder / name).mkdir(exist_ok=True)
    for number, size in enumerate(SIZES):
        found = write_jsonl(source / f"{number}.jsonl", records[first : first + size])
        prefix = folder / name / f"{kind}-{number}"
        model = str(write_tokenizer(folder))
        preprocess(PreprocessJob(kind, (str(found),), model, str(prefix)), lambda *_: None)
        prefixes.append(str(prefix))
        first += size
    list_shards(str(folder / name / kind), prefixes)
    return str(folder / name / kind)


def put_away(prefix: str, storage: Path, address: str, *options: str) -> int:
    """Copies all .bin files of a list to the storage and says so; the exit code."""
    storage.mkdir(exist_ok=True)
    for number in range(len(SIZES)):
        data = Path(f"{prefix}-{number}.bin")
        (storage / data.name).write_bytes(data.read_bytes())
    return command.main([prefix, "--remote", address, *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """local/KIND, and remote/KIND of which every .bin is in storage/."""
    folder = tmp_path_factory.mktemp("remote")
    write_clip_tokenizer(folder)
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"bucket://{folder}/storage")
        for kind in KINDS:
            written(folder, kind, "local")
            prefix = written(folder, kind, "remote")
            address = f"bucket://{folder}/storage"
            assert put_away(prefix, folder / "storage", address, "--delete-local") == 0
    assert not list((folder / "remote").glob("*.bin"))
    return folder


@pytest.fixture
def captions(tmp_path, allow) -> tuple[str, Path, str]:
    """A list of two shards that are still here, the folder for their copies, and its URL."""
    allow(f"bucket://{tmp_path}/storage")
    return (
        written(tmp_path, "caption", "data"),
        tmp_path / "storage",
        f"bucket://{tmp_path}/storage",
    )


def stream_of(folder: Path, stage: str, name: str):
    weights = {
        "pretrain": {"text": 5, "caption": 5, "interleaved": 2},
        "align": {"caption": 1},
        "instruct": {"edit": 2, "caption": 1},
    }[stage]
    blend = {kind: (str(folder / name / kind), weight) for kind, weight in weights.items()}
    config = run_config(folder, stage, blend)
    output = dataclasses.replace(config.logging, output_dir=str(folder / f"run-{stage}"))
    config = dataclasses.replace(config, logging=output)
    make = {"pretrain": pretrain_stream, "align": align_stream, "instruct": instruct_stream}
    return make[stage](config, "train")


@pytest.mark.parametrize("stage", ["pretrain", "align", "instruct"])
def test_remote_shards_give_the_stream_of_the_local_ones(folder, stage, allow):
    """To the bit, read by several threads, and after a restart."""
    allow(f"bucket://{folder}/storage")
    local, remote = stream_of(folder, stage, "local"), stream_of(folder, stage, "remote")
    assert remote.fingerprints() == local.fingerprints()
    expected = global_stream(local, 1, GLOBAL_BATCH, 0, 0, 4)
    assert global_stream(remote, 2, 3, 3, 0, 4, True) == expected
    restarted = global_stream(stream_of(folder, stage, "remote"), 1, 3, 0, 2, 2, True)
    assert restarted == expected[2 * GLOBAL_BATCH :]


def test_a_sample_is_one_request_of_its_bytes(folder, allow, bucket):
    allow(f"bucket://{folder}/storage")
    local, remote = (SampleStore(folder / name / "caption") for name in ("local", "remote"))
    assert [request[0] for request in bucket.requests] == ["info"]  # of the first shard
    index = remote.shards[0].sequences.index
    bucket.requests.clear()
    sample = remote[3]
    assert all((a == b).all() for a, b in zip(sample.parts, local[3].parts, strict=True))
    first, stop = index.documents[3:5].tolist()
    start, end = int(index.pointers[first]), int(index.pointers[stop])
    assert [request[2:] for request in bucket.requests] == [(start, end)]
    bucket.requests.clear()
    remote.first_parts(3, 1)  # as `align` reads it: without the image
    assert bucket.requests[0][3] == int(index.pointers[stop - 1]) and len(bucket.requests) == 1
    bucket.requests.clear()
    remote[10], remote[11]
    assert [request[0] for request in bucket.requests] == ["info", "get", "get"]  # once a shard


def test_a_url_that_is_not_allowed_is_named_before_anything_is_asked(folder, allow, bucket):
    allow("bucket:///elsewhere")
    prefix = folder / "remote" / "caption"
    assert missing_files(prefix) == []
    for opening in (SampleStore, remote_urls):
        with pytest.raises(ConfigError) as raised:
            opening(prefix)
        assert VARIABLE in str(raised.value) and f"bucket://{folder}/storage" in str(raised.value)
    assert not bucket.requests


def test_a_note_that_is_none_is_refused(captions):
    prefix, storage, address = captions
    assert put_away(prefix, storage, address, "--delete-local") == 0
    for text in ("s3://b/0.bin", '{"url": 3}', '{"url": "s3://b/x", "key": "secret"}', "[]"):
        Path(f"{prefix}-0.bin.url").write_text(text)
        with pytest.raises(InputError, match="is no note of a URL"):
            SampleStore(prefix)
    Path(f"{prefix}-0.bin.url").unlink()
    with pytest.raises(FileNotFoundError, match=r"caption-0\.bin missing"):
        SampleStore(prefix)


def test_copies_are_compared_before_a_local_file_goes(captions, capsys):
    prefix, storage, address = captions
    assert put_away(prefix, storage, address) == 0
    notes = [Path(f"{prefix}-{number}.bin.url") for number in (0, 1)]
    assert json.loads(notes[0].read_text()) == {"url": f"{address}/caption-0.bin"}
    assert Path(f"{prefix}-0.bin").exists()  # it was not asked to go, and is read
    for note in notes:
        note.unlink()
    whole = (storage / "caption-1.bin").read_bytes()
    changed = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    for copy, options, words in (
        (whole[:-1], (), f"it has {len(whole) - 1} bytes, not {len(whole)}"),
        (changed, ("--verify", "blocks"), "it has another content than the list notes"),
        (changed, ("--delete-local",), "it has another content than the list notes"),
        (None, ("--delete-local",), "nothing is there"),
    ):
        (storage / "caption-1.bin").unlink(missing_ok=True)
        if copy is not None:
            (storage / "caption-1.bin").write_bytes(copy)
        capsys.readouterr()
        assert command.main([prefix, f"{prefix}-1", "--remote", address, *options]) == 1
        assert words in capsys.readouterr().out
        assert Path(f"{prefix}-1.bin").read_bytes() == whole and not notes[1].exists()
    (storage / "caption-1.bin").write_bytes(whole)
    arguments = [prefix, f"{prefix}-1", "--remote", address, "--verify", "whole", "--delete-local"]
    assert command.main(arguments) == 0
    assert "noted, the local file is deleted" in capsys.readouterr().out
    assert not Path(f"{prefix}-1.bin").exists() and Path(f"{prefix}-0.bin").exists()
    assert command.main(arguments) == 0, "as after an interruption"
    assert len(SampleStore(prefix)) == sum(SIZES)  # one here, one there
    assert [found.problem for found in check_shards(prefix)] == [None, None]


def test_every_byte_is_compared_where_that_is_asked(tmp_path, allow, capsys):
    """A byte that no block of the fingerprint holds."""
    prefix, address = written(tmp_path, "caption", "data"), f"bucket://{tmp_path}/storage"
    allow(address)
    size = 8 << 20
    for end, content in ((".bin", bytes(size)), (".bin.other", bytes(5000) + b"\1" + bytes(10))):
        Path(f"{tmp_path}/large{end}").write_bytes(content.ljust(size, b"\0"))
    ones = np.ones(1, np.int64)
    write_index(tmp_path / "large.idx", np.dtype(np.uint8), ones * size, ones, ones)
    manifest = Manifest.read(Path(f"{prefix}-0.json"))
    dataclasses.replace(manifest, num_samples=1).write(tmp_path / "large.json")
    list_shards(str(tmp_path / "all"), [str(tmp_path / "large")])
    (tmp_path / "storage").mkdir()
    (tmp_path / "large.bin.other").rename(tmp_path / "storage" / "large.bin")
    arguments = [str(tmp_path / "all"), "--remote", address, "--verify"]
    assert command.main([*arguments, "whole"]) == 1
    assert "large.bin after byte 0" in capsys.readouterr().out
    assert command.main([*arguments, "blocks"]) == 0
    assert command.main([*arguments[:-1], "--delete-local"]) == 1
    assert (tmp_path / "large.bin").exists()
    assert command.main([*arguments, "blocks", "--delete-local"]) == 0


@pytest.mark.parametrize("address", ["file://{}/data", "file://{}/link", "bucket://{}/data"])
def test_a_copy_that_is_the_file_itself_is_not_deleted(tmp_path, allow, capsys, address):
    """The shards' own folder, by another name or as a bucket that is mounted there."""
    prefix, address = written(tmp_path, "caption", "data"), address.format(tmp_path)
    (tmp_path / "link").symlink_to(Path(prefix).parent)
    allow(address)
    before = {path: path.read_bytes() for path in Path(prefix).parent.iterdir()}
    for options in ((), ("--verify", "blocks")):
        assert command.main([prefix, "--remote", address, "--delete-local", *options]) == 1
        assert capsys.readouterr().out.count("itself, no copy") == 2
        assert {path: path.read_bytes() for path in Path(prefix).parent.iterdir()} == before


def test_a_link_that_leads_nowhere_is_no_local_file(captions):
    prefix, storage, address = captions
    assert put_away(prefix, storage, address, "--delete-local") == 0
    Path(f"{prefix}-0.bin").symlink_to(storage / "gone")
    assert len(list(SampleStore(prefix))) == sum(SIZES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--remote", "s3://b/x"], VARIABLE),
        (["NONE", "--remote", "ADDRESS"], "does not list"),
        (["--delete-local"], "need --remote"),
        (["--verify", "blocks"], "need --remote"),
    ],
)
def test_what_cannot_be_noted_is_refused(captions, capsys, arguments, words):
    prefix, _, address = captions
    arguments = [address if each == "ADDRESS" else each for each in arguments]
    try:
        code = command.main([prefix, *arguments])
    except SystemExit as left:
        code = left.code
    assert code == 2 and words in capsys.readouterr().err
    assert not list(Path(prefix).parent.glob("*.url"))


def test_a_copy_of_another_size_is_refused_before_it_is_read(captions):
    prefix, storage, address = captions
    assert put_away(prefix, storage, address, "--delete-local") == 0
    copy = storage / "caption-1.bin"
    copy.write_bytes(copy.read_bytes() + b"more")
    store = SampleStore(prefix)
    store.part_sizes(SIZES[0])  # by the index alone
    with pytest.raises(InputError, match=r"bucket://.*/caption-1\.bin has \d+ bytes, its index"):
        store[SIZES[0]]
    copy.unlink()
    with pytest.raises(InputError, match=r"caption-1\.bin: nothing is there"):
        store[SIZES[0]]


def test_a_request_that_fails_is_made_again(folder, allow, bucket, caplog):
    allow(f"bucket://{folder}/storage")
    local, remote = (SampleStore(folder / name / "caption") for name in ("local", "remote"))
    bucket.failures[:] = [ConnectionResetError("reset by peer"), b"short"]
    with caplog.at_level(logging.WARNING):
        found = remote[0]
    assert all((a == b).all() for a, b in zip(found.parts, local[0].parts, strict=True))
    assert "reset by peer; asked again in 0 s" in caplog.text
    assert "5 bytes came instead of" in caplog.text


@pytest.mark.parametrize(
    ("error", "num_requests", "words"),
    [
        (TimeoutError("no answer"), 3, "did not come in 3 attempts, the last: TimeoutError"),
        (RuntimeError("loop is closed"), 3, "did not come in 3 attempts"),
        (PermissionError("Forbidden"), 1, "access is denied (PermissionError: Forbidden)"),
        (FileNotFoundError("gone"), 1, "it is not there any more"),
    ],
)
def test_storage_that_does_not_answer_ends_the_run_and_is_no_bad_image(
    folder, allow, bucket, tmp_path, capsys, error, num_requests, words
):
    allow(f"bucket://{folder}/storage")
    stream = stream_of(folder, "instruct", "remote")
    global_stream(stream, 1, 3, 0, 0, 1)  # from here on sizes are known
    bucket.requests.clear()
    bucket.failures[:] = [error] * 3
    with pytest.raises(StorageError) as raised:
        global_stream(stream, 1, 3, 0, 0, 1)
    assert words in str(raised.value) and len(bucket.requests) == num_requests
    assert exit_code_of(raised.value) == exit_codes.FAILURE  # a job script starts it again
    report_failure(tmp_path, 0, raised.value, 0.0)
    assert words in capsys.readouterr().err.partition("\n")[0]
    bucket.failures.clear()
    store = SampleStore(folder / "remote" / "caption")
    tokenizer = Tokenizer(write_tokenizer(folder))
    bucket.failures[:] = [error] * 3
    with pytest.raises(StorageError):  # nor a bad sample of `inspect --check`
        list(check_dataset(store, tokenizer, 1, lambda *_: None))


def test_nothing_is_imported_without_remote_shards(folder):
    code = (
        "import sys; from megatron_kosmosg.data.store import SampleStore; "
        f"store = SampleStore({str(folder / 'local' / 'caption')!r}); store[0]; "
        "store.fingerprint(); assert 'fsspec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def read_in_child(prefix: str, sending) -> None:
    sending.send([part.tobytes() for part in SampleStore(prefix)[0].parts])


def test_a_fork_has_a_file_system_of_its_own(folder, allow):
    allow(f"bucket://{folder}/storage")
    prefix = str(folder / "remote" / "caption")
    expected = [part.tobytes() for part in SampleStore(prefix)[0].parts]
    mine = remote_file._file_system("bucket://x/y")
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=read_in_child, args=(prefix, sending))
    child.start()
    assert receiving.poll(30) and receiving.recv() == expected
    child.join(30)
    assert child.exitcode == 0
    assert remote_file._file_system_of("bucket", os.getpid()) is mine
    assert remote_file._file_system_of("bucket", os.getpid() + 1) is not mine


def test_shards_behind_a_web_server_are_read_by_ranges(folder, allow, tmp_path, monkeypatch):
    """fsspec's own file system of a network, whose event loop all threads use."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(Ranges, "folder", folder / "storage", raising=False)
    monkeypatch.setattr(Ranges, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        allow(address)
        local = SampleStore(folder / "local" / "caption")
        prefix = written(tmp_path, "caption", "data")
        assert command.main([prefix, "--remote", address, "--delete-local"]) == 0
        remote = SampleStore(prefix)
        Ranges.asked.clear()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(remote.__getitem__, range(len(remote))))
        assert len(Ranges.asked) == len(remote) == sum(SIZES)
        for index, sample in enumerate(found):
            pairs = zip(sample.parts, local[index].parts, strict=True)
            assert all((a == b).all() for a, b in pairs)
    finally:
        server.shutdown()
        server.server_close()
