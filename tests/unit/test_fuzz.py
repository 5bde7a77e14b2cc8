"""Every reader of files of other people, on files changed at random: a value, or our error.

Long because every reader is in its one table.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as torch_checkpoint

from megatron_kosmosg.checkpoint.description import read_description
from megatron_kosmosg.checkpoint.folder import COMPLETE_FILE, damage
from megatron_kosmosg.checkpoint.plain_data import read_common
from megatron_kosmosg.config.errors import ConfigError, ConversionError, InputError
from megatron_kosmosg.config.input_paths import PACKAGE
from megatron_kosmosg.config.load import load_config, load_saved_config, to_yaml
from megatron_kosmosg.config.untrusted_folders import check_pipeline_folder
from megatron_kosmosg.construction.annotations import Annotations
from megatron_kosmosg.conversion.safetensors_files import SafetensorsFolder
from megatron_kosmosg.conversion.torch_file import LazyTensor, load_lazily
from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.kinds.record import Rejected
from megatron_kosmosg.data.latent_cache import LatentManifest, LatentSource
from megatron_kosmosg.data.manifest import Manifest, kind_on_disk
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.foreign_files import OutsideFolder
from megatron_kosmosg.inference.prompt_records import PromptError, open_image_file, read_records
from megatron_kosmosg.preprocess.input_files import find_inputs, shard_size
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.shard_work import ShardJob, work_on_shard
from megatron_kosmosg.shards import ShardFolder
from megatron_kosmosg.toy.report.report_page import write_report
from tests.support.data_helpers import (
    build_dataset,
    image_records,
    noise_image,
    text_records,
    write_jsonl,
    write_parquet,
    write_tar,
    write_tokenizer,
)
from tests.support.fuzzing import fuzz
from tests.support.moment_seeds import moment_seed
from tests.support.report_files import ROW, write_run


@dataclass(frozen=True)
class Reader:
    """A file to change, what reads it, and the errors that it documents."""

    path: Path
    read: Callable[[], object]
    errors: tuple[type[Exception], ...] = (ValueError,)


def preprocessing(kind: str, name: str, write: Callable[[Path], object]) -> Callable:
    def make(folder: Path) -> Reader:
        path = folder / name
        write(path)
        model = str(write_tokenizer(folder))
        made, number = ShardFolder(folder / "made"), 0
        made.path.mkdir()

        def read() -> None:
            nonlocal number
            (source,) = find_inputs([str(path)], KINDS[kind])
            reader = source.reader(Options())
            try:
                shards = reader.shards(path, None, shard_size([source]))
            except Rejected:
                return
            for shard in shards:
                number += 1
                work_on_shard(ShardJob(kind, ((source, shard),), Options(), model, made, number))
            made.clear()

        return Reader(path, read, (ValueError, InputError))

    return make


def images(kind: str) -> Callable[[Path], object]:
    return lambda path: write_jsonl(path, image_records(path.parent, kind, 4))


def members(path: Path) -> None:
    files = []
    for i in range(3):
        output = {"caption": f"red {i}", "tags": [1, 2]}
        files += [(f"{i}.json", json.dumps(output).encode()), (f"{i}.png", noise_image(i))]
    write_tar(path, files)


def rows(path: Path) -> None:
    write_parquet(path, [{"image": noise_image(i), "caption": f"red {i}"} for i in range(3)])


def arrow(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"image": [noise_image(1)] * 2, "caption": ["red", "blue"]})
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


def packed(path: Path) -> None:
    path.write_bytes(gzip.compress(write_jsonl(path, text_records(4)).read_bytes(), mtime=0))


def saved_dataset(folder: Path) -> Reader:
    (folder / "set").mkdir()
    arrow(folder / "set" / "data.arrow")
    path = folder / "set" / "state.json"
    path.write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return Reader(
        path,
        lambda: find_inputs([str(folder / "set")], KINDS["caption"]),
        (ValueError, OutsideFolder, FileNotFoundError),
    )


def image_file(form: str) -> Callable[[Path], Reader]:
    def make(folder: Path) -> Reader:
        path = folder / f"picture.{form.lower()}"
        path.write_bytes(noise_image(1, 24, 24, form))
        return Reader(path, lambda: open_image_file(path), (PromptError,))

    return make


def prompts(folder: Path) -> Reader:
    records = [
        {"id": "a", "prompt": "a <image> here", "images": ["cat.png"], "seed": 3, "steps": 5},
        {"content": [{"text": "b"}, {"image": "dog.png"}], "num_images": 2, "guidance": 1.5},
    ]
    path = write_jsonl(folder / "prompts.jsonl", records)
    return Reader(path, lambda: read_records(path), (PromptError,))


def annotations(folder: Path) -> Reader:
    (folder / "m.png").write_bytes(noise_image(1))
    entities = [{"text": "cat", "span": [0, 3], "mask": "m.png"}]
    path = write_jsonl(
        folder / "a.jsonl",
        [{"key": str(i), "caption": "cat", "entities": entities} for i in (1, 2)],
    )

    def read() -> None:
        found = Annotations(path)
        for key in ("1", "2"):
            for entity in found.find(key).get("entities") or []:
                if isinstance(entity, dict):
                    found.file(entity.get("mask"))

    return Reader(path, read, (ValueError, Rejected))


def manifest(folder: Path) -> Reader:
    path = folder / "data.json"
    Manifest("text", "ab", 10, 3, 20, 0, 1).write(path)
    return Reader(path, lambda: kind_on_disk(folder / "data"), (InputError,))


def latent_manifest(folder: Path) -> Reader:
    path = folder / "data.latents.json"
    LatentManifest(LatentSource("a", "b", "c"), [2, 4, 8, 8], 3, 1, "fp32", 1, ["x"]).write(path)
    return Reader(path, lambda: LatentManifest.read(path), (InputError,))


def store(ending: str) -> Callable[[Path], Reader]:
    def make(folder: Path) -> Reader:
        prefix = build_dataset(folder, "caption", 4)

        def read() -> None:
            opened = SampleStore(prefix)
            for i in range(len(opened)):
                opened.part_sizes(i)
                opened[i].images()

        return Reader(Path(f"{prefix}{ending}"), read, (ValueError, InputError))

    return make


def tensors_of(content: object) -> None:
    for value in content.values() if isinstance(content, dict) else ():
        if isinstance(value, LazyTensor):
            value.info  # noqa: B018 - a property that may fail
            value.read()
        else:
            tensors_of(value)


def torch_file(folder: Path) -> Reader:
    path = folder / "weights.pt"
    torch.save({"model": {"a": torch.ones(3, 4), "b": torch.ones(2).half()}, "n": 3}, path)
    return Reader(path, lambda: tensors_of(load_lazily(path)), (ConversionError,))


def torch_pickle(folder: Path) -> Reader:
    """The pickle alone: in the archive most changes meet its checksum first."""
    reader, inner = torch_file(folder), folder / "data.pkl"
    with zipfile.ZipFile(reader.path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    inner.write_bytes(parts[name])

    def read() -> None:
        with zipfile.ZipFile(reader.path, "w") as archive:
            for other, content in (parts | {name: inner.read_bytes()}).items():
                archive.writestr(other, content)
        reader.read()

    return replace(reader, path=inner, read=read)


def safetensors(folder: Path) -> Reader:
    path = folder / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.zeros(2)}, path)

    def read() -> None:
        found = SafetensorsFolder(folder, "model")
        for name in found.names():
            found.read(name)

    return Reader(path, read, (ConversionError,))


def shard_index(folder: Path) -> Reader:
    save_file({"a": torch.ones(3)}, folder / "model-1.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}))
    return Reader(path, lambda: SafetensorsFolder(folder, "model"), (ConversionError,))


def description(folder: Path) -> Reader:
    state = {"a": torch.ones(4, 3), "b": {"c": torch.zeros(2), "n": 5}}
    torch_checkpoint.save(state, checkpoint_id=folder / "iter", no_dist=True)
    path = folder / "iter" / ".metadata"
    return Reader(path, lambda: read_description(path.parent), (ConfigError,))


def common(folder: Path) -> Reader:
    path = folder / "common.pt"
    torch.save({"iteration": 3, "layout": {"a": [1, 2]}, "t": torch.ones(2)}, path)
    return Reader(path, lambda: read_common(folder), (ConfigError,))


def saved_config(folder: Path) -> Reader:
    path = folder / "config.yaml"
    # The place of the package left out: the same content, hence the same changes, everywhere.
    path.write_text(to_yaml(load_config("debug_align", [])).replace(f"{PACKAGE.parent}/", ""))
    return Reader(path, lambda: load_saved_config(path), (ConfigError,))


def listing(folder: Path) -> Reader:
    (folder / "a").write_text("aaa")
    path = folder / COMPLETE_FILE
    path.write_text(json.dumps({"files": {"a": 3}, "digests": {"a": "00"}}))
    return Reader(path, lambda: damage(folder), ())


def model_index(folder: Path) -> Reader:
    path = folder / "model_index.json"
    index = {"_class_name": "KosmosGPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    path.write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    return Reader(path, lambda: check_pipeline_folder(folder), (ConversionError,))


def seeds(folder: Path) -> Reader:
    (folder / "in" / "0001").mkdir(parents=True)
    output = {"input": "a cat", "edit": "make it red", "output": "a red cat"}
    (folder / "in" / "0001" / "prompt.json").write_text(json.dumps(output))
    for end in (0, 1):
        (folder / "in" / "0001" / f"7_{end}.jpg").write_bytes(noise_image(end, 12, 12, "JPEG"))
    path = folder / "in" / "seeds.json"
    path.write_text(json.dumps([["0001", ["7"]]]))

    def read() -> None:
        (source,) = find_inputs([str(folder / "in")], KINDS["edit"])
        options = Options()
        for shard in source.reader(options).shards(source.path, None, shard_size([source])):
            list(source.reader(options).read(shard, options))

    return Reader(path, read)


def report(name: str) -> Callable[[Path], Reader]:
    def make(folder: Path) -> Reader:
        write_run(folder / "out", [ROW])
        shutil.rmtree(folder / "out" / "align")  # a chart takes most of the time
        shutil.rmtree(folder / "out" / "instruct")
        return Reader(folder / "out" / name, lambda: write_report(folder / "out"))

    return make


READERS: dict[str, Callable[[Path], Reader]] = {
    "captions": preprocessing("caption", "records.jsonl", images("caption")),
    "interleaved": preprocessing("interleaved", "records.jsonl", images("interleaved")),
    "compositional": preprocessing("compositional", "records.jsonl", images("compositional")),
    "edits": preprocessing("edit", "records.jsonl", images("edit")),
    "texts": preprocessing("text", "t.jsonl", lambda path: write_jsonl(path, text_records(4))),
    "plain text": preprocessing("text", "t.txt", lambda path: path.write_text("a b.\n\nc d.\n")),
    "tar": preprocessing("caption", "s.tar", members),
    "Parquet": preprocessing("caption", "r.parquet", rows),
    "Arrow": preprocessing("caption", "r.arrow", arrow),
    "compressed": preprocessing("text", "t.jsonl.gz", packed),
    "saved dataset": saved_dataset,
    "prompt folders": seeds,
    "PNG": image_file("PNG"),
    "JPEG": image_file("JPEG"),
    "prompts": prompts,
    "annotations": annotations,
    "manifest": manifest,
    "latent manifest": latent_manifest,
    "index": store(".idx"),
    "data": store(".bin"),
    "fairseq file": torch_file,
    "fairseq pickle": torch_pickle,
    "safetensors": safetensors,
    "index of safetensors": shard_index,
    "description": description,
    "common.pt": common,
    "config.yaml": saved_config,
    "complete.json": listing,
    "model_index.json": model_index,
    "report: record": report("quickstart.json"),
    "report: metrics": report("evaluation/metrics.json"),
    "report: pictures": report("evaluation/images.json"),
}


SLOW_READERS = {
    "config.yaml": 40,
    "report: record": 20,
    "report: metrics": 10,
    "report: pictures": 10,
}
"""{reader: how many changed copies are tried where others get 200}. A count, not a time: which
copies are tried must not depend on the machine."""


def _faults(name: str, folder: Path, seed: int, count: int, seconds: float) -> list[str]:
    reader = READERS[name](folder)
    reader.read()  # unchanged
    return fuzz(
        reader.path, reader.read, reader.errors, folder, seed=seed, count=count, seconds=seconds
    )


@pytest.mark.parametrize("name", READERS)
def test_changed_files_end_in_an_error_of_ours(tmp_path, name):
    count = SLOW_READERS.get(name, 200)
    assert _faults(name, tmp_path, seed=1, count=count, seconds=600) == []


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(4))
@pytest.mark.parametrize("name", READERS)
def test_many_changed_files_end_in_an_error_of_ours(tmp_path, name, shard):
    seed = moment_seed()
    assert _faults(name, tmp_path, seed, count=100_000, seconds=5) == [], f"seed {seed}"


def test_a_fault_is_noticed(tmp_path):
    path = tmp_path / "in" / "file"
    path.parent.mkdir()
    path.write_text('{"a": 1}')
    outside = tmp_path / "outside"

    def writes() -> None:
        outside.write_text("x")

    def fills() -> None:
        bytearray(8 << 30)

    assert "JSONDecodeError" in str(
        fuzz(
            path,
            lambda: json.loads(path.read_bytes()),
            (),
            path.parent,
            seed=0,
            count=50,
            seconds=1,
        )
    )
    assert str(outside) in str(fuzz(path, writes, (), path.parent, seed=0, count=1, seconds=1))
    assert "MemoryError" in str(fuzz(path, fills, (), path.parent, seed=0, count=1, seconds=1))


def test_a_pickle_that_ends_within_a_number_is_damaged(tmp_path):
    """What torch's own unpickler raises then is no error of pickle's."""
    path = tmp_path / "common.pt"
    path.write_bytes(b"\x80\x02j\x00")
    with pytest.raises(ConfigError, match="cannot be read as plain data"):
        read_common(tmp_path)
