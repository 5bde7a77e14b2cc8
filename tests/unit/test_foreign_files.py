"""What files of other people may make a command read, and how much: one harmless proof each.

Long because every kind of file has its proof here.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin

from megatron_kosmosg import foreign_files
from megatron_kosmosg.config.errors import ConversionError, InputError
from megatron_kosmosg.construction.annotations import Annotations
from megatron_kosmosg.conversion.safetensors_files import SafetensorsFolder
from megatron_kosmosg.conversion.torch_file import load_lazily
from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.kinds.record import Record, Rejected
from megatron_kosmosg.data.manifest import Manifest
from megatron_kosmosg.data.sentences import sentence_paths
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import JSON, RawSample
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.files import fingerprint
from megatron_kosmosg.foreign_files import OutsideFolder, inside, parse_json, read_file
from megatron_kosmosg.inference.prompt_records import PromptError, read_records
from megatron_kosmosg.preprocess import lines
from megatron_kosmosg.preprocess.image_check import ImageCheck
from megatron_kosmosg.preprocess.input_files import find_inputs
from megatron_kosmosg.preprocess.jsonl import JsonlReader, parse_object
from megatron_kosmosg.preprocess.options import Options
from megatron_kosmosg.preprocess.prompt_folders import PromptFolderReader
from megatron_kosmosg.preprocess.record_readers import BadRecord, ShardSize
from megatron_kosmosg.preprocess.tar import TarReader
from megatron_kosmosg.terminal_text import printable, printable_lines
from tests.support.data_helpers import (
    build_dataset,
    noise_image,
    write_jsonl,
    write_tar,
    write_tokenizer,
)
from tests.support.tiny_models import write_stable_diffusion

SIZE = ShardSize(1000, 1 << 20, 1 << 20)


@pytest.fixture
def dataset_folder(tmp_path) -> Path:
    """The folder of an input; beside it lies an image that is not the input's."""
    folder = tmp_path / "given"
    folder.mkdir()
    (tmp_path / "private.png").write_bytes(noise_image(1))
    (folder / "own.png").write_bytes(noise_image(2))
    return folder


def records_of(reader, path: Path) -> Iterator[Record | BadRecord]:
    for shard in reader.shards(path, None, SIZE):
        yield from reader.read(shard, Options())


def reason_of(found: Record | BadRecord) -> str:
    assert isinstance(found, BadRecord)
    return found.rejected.reason


# ---- where names may lead ------------------------------------------------------------------------


def test_a_name_lies_in_the_folder_or_in_the_one_that_is_allowed_too(dataset_folder, tmp_path):
    allowed = tmp_path / "allowed"
    (dataset_folder / "link").symlink_to(tmp_path)
    for name in ("own.png", "a/../own.png", str(dataset_folder / "own.png"), "link/private.png"):
        assert inside(dataset_folder, name) == dataset_folder / name
    for name in ("../private.png", "/etc/passwd", "a/../../private.png", "link/../given2/x"):
        with pytest.raises(OutsideFolder, match="lies outside"):
            inside(dataset_folder, name)
    assert inside(dataset_folder, str(allowed / "x"), allowed) == allowed / "x"
    with pytest.raises(OutsideFolder):
        inside(dataset_folder, str(tmp_path / "allowed2" / "x"), allowed)


def test_a_folder_under_another_name_is_the_same_folder(dataset_folder, tmp_path):
    (tmp_path / "alias").symlink_to(dataset_folder)
    for folder, named in (
        (dataset_folder, tmp_path / "alias"),
        (tmp_path / "alias", dataset_folder),
    ):
        assert inside(folder, str(named / "own.png")) == named / "own.png"


def test_a_image_from_elsewhere_is_rejected_with_the_flag_that_allows_it(dataset_folder, tmp_path):
    # c9c3073 took any image that the process could read into the dataset.
    elsewhere = str(tmp_path / "private.png")
    record = Record("x", {}, dataset_folder)
    for name in ("../private.png", elsewhere):
        with pytest.raises(Rejected, match="image lies outside the folder") as rejected:
            ImageCheck(Options()).read(record, {"image": name}, "image")
        assert f"--image-root {tmp_path}" in rejected.value.detail
    for name in ("own.png", str(dataset_folder / "own.png")):
        assert ImageCheck(Options()).read(record, {"image": name}, "image") == noise_image(2)
    rooted = ImageCheck(Options(image_root=str(tmp_path)))
    for name in ("private.png", elsewhere):
        assert rooted.read(record, {"image": name}, "image") == noise_image(1)
    assert rooted.read(record, {"image": str(dataset_folder / "own.png")}, "image") == noise_image(
        2
    )


def test_prompts_show_images_of_their_own_folder(dataset_folder, tmp_path):
    prompt = {"prompt": "a <image>", "images": ["../private.png"]}
    path = write_jsonl(dataset_folder / "prompts.jsonl", [prompt])
    with pytest.raises(PromptError, match="prompts.jsonl:1: .* lies outside .*--image-root"):
        read_records(path)
    (record,) = read_records(path, tmp_path)
    assert record.images == [dataset_folder / "../private.png"]
    write_jsonl(path, [{"prompt": "a", "control_image": str(tmp_path / "private.png")}])
    with pytest.raises(PromptError, match="lies outside"):
        read_records(path)


def test_prompt_folders_lie_in_the_input(dataset_folder, tmp_path):
    # c9c3073 read any folder that seeds.json named.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prompt.json").write_text('{"input": "a", "edit": "b", "output": "c"}')
    (dataset_folder / "seeds.json").write_text(
        json.dumps([["../other", ["1"]], [str(tmp_path), ["1"]]])
    )
    found = records_of(PromptFolderReader(), dataset_folder)
    assert {reason_of(record) for record in found} == {"prompt folder lies outside the input"}


def test_masks_lie_beside_their_annotations(dataset_folder, tmp_path):
    path = write_jsonl(dataset_folder / "masks.jsonl", [{"key": "a"}])
    with pytest.raises(Rejected, match="mask lies outside the folder of the annotations"):
        Annotations(path).file("../private.png")
    assert Annotations(path).file("own.png") == noise_image(2)
    assert Annotations(path, str(tmp_path)).file(str(tmp_path / "private.png")) == noise_image(1)


def test_a_listing_names_files_of_its_own_dataset(tmp_path):
    (tmp_path / "set" / "json").mkdir(parents=True)
    (tmp_path / "other.tsv").write_text("a\tb\n")
    listing = tmp_path / "set" / "json" / "train.json"
    for name in ("../other.tsv", str(tmp_path / "other.tsv")):
        listing.write_text(json.dumps([{"source": [name]}]))
        with pytest.raises(ValueError, match="which is not in"):
            find_inputs([str(listing)], KINDS["edit"])


def test_an_index_names_shards_of_its_own_folder(tmp_path):
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": "../other.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="lies outside"):
        SafetensorsFolder(tmp_path / "model", "model")


# ---- how much ------------------------------------------------------------------------------------


def test_pipes_devices_and_huge_files_are_no_images(dataset_folder):
    # c9c3073 waited for the pipe's writer, and read /dev/zero until memory ended.
    os.mkfifo(dataset_folder / "pipe.png")
    (dataset_folder / "zero.png").symlink_to("/dev/zero")
    with (dataset_folder / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    record = Record("x", {}, dataset_folder)
    for name, why in (("pipe", "no regular"), ("zero", "no regular"), ("huge", "512 MiB")):
        with pytest.raises(Rejected, match="image cannot be read") as rejected:
            ImageCheck(Options()).read(record, {"image": f"{name}.png"}, "image")
        assert why in rejected.value.detail


def test_a_line_has_a_longest_length_also_where_it_is_packed(dataset_folder, monkeypatch):
    # c9c3073 unpacked a line of 3.9 MB to its 4 GB.
    monkeypatch.setattr(lines, "MAX_TEXT_BYTES", 1000)
    text = b'{"a": 1}\n' + b'{"a": "' + b"x" * 5_000_000 + b'"}\n' + b'{"a": 2}\n'
    for name, packed in (("a.jsonl", text), ("a.jsonl.gz", gzip.compress(text))):
        (dataset_folder / name).write_bytes(packed)
        first, long, last = records_of(JsonlReader(), dataset_folder / name)
        assert reason_of(long) == "text is too long" and long.source == f"{name}:2"
        assert [first.fields, last.fields] == [{"a": 1}, {"a": 2}]


def test_a_line_may_be_as_long_as_allowed(dataset_folder, monkeypatch):
    monkeypatch.setattr(lines, "MAX_TEXT_BYTES", 8)
    (dataset_folder / "a.jsonl").write_bytes(b'{"a": 1}\n{"b": 2}\n{"c": 33}\n')
    found = list(records_of(JsonlReader(), dataset_folder / "a.jsonl"))
    assert [type(record) for record in found] == [Record, Record, BadRecord]


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"a": ' * 101 + "1" + "}" * 101, "101 deep|100 deep"),
        ("[" * 100_000, "deep"),
        ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
        ('{"a": "' + "x" * (33 << 20) + '"}', "32 MiB"),
    ],
)
def test_json_has_bounds(text, why):
    # c9c3073 ended prompts with a RecursionError, and read numbers of up to 4,300 digits.
    with pytest.raises(ValueError, match=why):
        parse_json(text)
    with pytest.raises(Rejected, match="not JSON"):
        parse_object(text.encode())
    with pytest.raises(ValueError, match=why):
        RawSample.of_bytes([(np.frombuffer(text.encode(), np.uint8), JSON)])


def test_json_within_the_bounds_is_read():
    deep = '{"a": ' * 100 + str(2**127) + "}" * 100
    assert parse_json(deep) == json.loads(deep)
    wide = json.dumps([[i] for i in range(1000)])
    assert parse_json(wide.encode()) == json.loads(wide)


def test_prompts_ask_for_a_number_of_images_that_can_be_drawn(tmp_path):
    for field in ("num_images", "steps", "height"):
        path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", field: 10**8}])
        with pytest.raises(PromptError, match=f"{field} is a whole number from 1 to"):
            read_records(path)
    (tmp_path / "p.jsonl").write_text('{"prompt": ' + "[" * 100_000)
    with pytest.raises(PromptError, match="not JSON"):
        read_records(tmp_path / "p.jsonl")


def test_a_folder_that_holds_itself_is_fingerprinted_once(tmp_path, monkeypatch):
    # c9c3073 walked two links to `.` for ever.
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_text("x")
    plain = fingerprint(tmp_path / "a")
    for name in ("one", "two"):
        (tmp_path / "a" / name).symlink_to(".")
    assert fingerprint(tmp_path / "a") == plain
    # Two links a folder to the next: no ring, and 2^30 ways.
    for i in range(30):
        (tmp_path / f"d{i}").mkdir()
        for name in ("one", "two"):
            (tmp_path / f"d{i}" / name).symlink_to(tmp_path / f"d{i + 1}")
    (tmp_path / "d30").mkdir()
    monkeypatch.setattr(foreign_files, "MAX_FILES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 files"):
        fingerprint(tmp_path / "d0")


def test_a_pipe_is_no_part_of_a_model(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        fingerprint(tmp_path)


def test_links_in_a_model_folder_count_as_what_they_lead_to(tmp_path):
    # Caches of downloads are folders of links.
    for name in ("plain", "linked", "store"):
        (tmp_path / name / "unet").mkdir(parents=True)
    for name in ("plain", "store"):
        (tmp_path / name / "unet" / "w").write_text("weights")
    (tmp_path / "linked" / "unet" / "w").symlink_to(tmp_path / "store" / "unet" / "w")
    assert fingerprint(tmp_path / "plain") == fingerprint(tmp_path / "linked")


def test_a_torch_file_is_not_unpacked(tmp_path):
    # c9c3073 made 5.9 GB of 2.9 MB.
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    packed = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < 10_000
    with pytest.raises(ConversionError, match="bytes unpack to"):
        load_lazily(packed)


def test_a_pickle_takes_no_more_memory_than_it_is_long(tmp_path):
    # 0x7fffffff is the place in a table; the unpickler in C makes the table that long.
    table = pickle.PROTO + b"\x02" + b"N" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f" + b"."
    array = pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + (1 << 40).to_bytes(8, "little") + b"."
    for content, is_read in ((table, True), (array, False)):
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", content)
        if is_read:
            assert load_lazily(path) is None
        else:
            with pytest.raises(ConversionError, match="cannot be unpickled"):
                load_lazily(path)


def test_a_member_of_a_tar_has_a_largest_size(dataset_folder, monkeypatch):
    monkeypatch.setattr("megatron_kosmosg.preprocess.tar.MAX_FILE_BYTES", 1000)
    write_tar(dataset_folder / "a.tar", [("1.png", b"x" * 1001), ("2.png", b"x" * 1000)])
    first, second = records_of(TarReader(), dataset_folder / "a.tar")
    assert reason_of(first) == "tar member is too large" and isinstance(second, Record)


def test_a_file_has_a_largest_size(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 2000)
    assert len(read_file(tmp_path / "a", 2000)) == 2000
    with pytest.raises(OSError, match="more than"):
        read_file(tmp_path / "a", 1999)


# ---- what held at c9c3073 already --------------------------------------------------------------


class Touch:
    """Unpickled without restraint, makes a file: the harmless proof that code ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_weights_in_torchs_format_run_nothing(tmp_path):
    mark, folder = tmp_path / "code-ran", write_stable_diffusion(tmp_path / "sd")
    for part, read in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
        torch.save({"a": Touch(mark)}, folder / part / "diffusion_pytorch_model.bin")
        with pytest.raises((OSError, pickle.UnpicklingError)):
            read.from_pretrained(folder / part)
    torch.save({"unet.a": Touch(mark)}, tmp_path / "lora.bin")
    with pytest.raises((OSError, pickle.UnpicklingError)):
        StableDiffusionLoraLoaderMixin.lora_state_dict(tmp_path, weight_name="lora.bin")
    assert not mark.exists()


def test_a_table_of_objects_runs_nothing(tmp_path):
    mark, prefix = tmp_path / "code-ran", build_dataset(tmp_path, "caption", 3)
    for path in sentence_paths(prefix):
        np.save(path, np.array([Touch(mark)], dtype=object))
    with pytest.raises(ValueError, match="[Pp]ickle|object"):
        SampleStore(prefix).sentences(Tokenizer(write_tokenizer(tmp_path))).take(np.array([0]))
    assert not mark.exists()


def test_a_glob_enters_a_ring_of_links_once(tmp_path, monkeypatch):
    # c9c3073 named each file once a turn of the ring, 40 of them; two links were 2^40.
    for name in ("a/b/1.jsonl", "a/2.jsonl", "a/.hidden/3.jsonl", "a/x[1]/4.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    for name in ("one", "two"):
        (tmp_path / "a" / name).symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    expected = ["a/2.jsonl", "a/b/1.jsonl", "a/x[1]/4.jsonl"]
    text = KINDS["text"]
    for pattern in ("**/*.jsonl", "a/**/*.jsonl", f"{tmp_path}/a/**/*.jsonl", "a/**/**/*.jsonl"):
        found = [str(source.path) for source in find_inputs([pattern], text)]
        assert [name.removeprefix(f"{tmp_path}/") for name in found] == expected, pattern
    assert [
        str(dataset_folder.path) for dataset_folder in find_inputs(["a/**/b/*.jsonl"], text)
    ] == expected[1:2]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_counts_beyond_the_file_are_one_message(tmp_path):
    prefix = build_dataset(tmp_path, "caption", 3)
    index = Path(f"{prefix}.idx")
    whole = index.read_bytes()
    for place, count in ((18, 1 << 60), (26, 1 << 60), (26, 0)):  # of sequences, of documents
        content = bytearray(whole)
        content[place : place + 8] = count.to_bytes(8, "little")
        index.write_bytes(content)
        with pytest.raises(InputError, match="no whole index"):
            SampleStore(prefix)
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConversionError, match="no whole safetensors file"):
        SafetensorsFolder(tmp_path, "model")


# ---- what is said --------------------------------------------------------------------------------


def test_a_terminal_is_shown_no_control_characters():
    # c9c3073 printed names, keys and captions as they stood.
    text = "a\x1b]0;title\x07b\x9b2J\u202ec\rd\x7f\tnew\nline"
    shown = r"a\x1b]0;title\x07b\x9b2J\u202ec\rd\x7f"
    assert printable(text) == shown + r"\tnew\nline"
    assert printable_lines(text) == shown + "\tnew\nline"
    assert printable("é 日本 𝕏 عربي") == "é 日本 𝕏 عربي"


@pytest.mark.parametrize(
    "changed",
    [
        {"num_samples": "3"},
        {"num_samples": -1},
        {"num_images": 10**30},
        {"vocab_size": True},
        {"kind": ["text"]},
        {"kind": "x" * 1001},
        {"num_tokens": 1.5},
        {"other": 1},
    ],
)
def test_a_manifest_has_texts_and_counts(tmp_path, changed):
    path = tmp_path / "data.json"
    Manifest("text", "ab", 10, 3, 20, 0, 1).write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(InputError, match="is not a readable manifest"):
        Manifest.read(path)
