"""torch.save files are read tensor by tensor, and nothing in them runs unasked."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.fairseq_file import FairseqFile
from megatron_kosmosg.conversion.torch_file import LazyTensor, load_lazily

_GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "half": torch.randn(3, 4, generator=_GENERATOR).half(),
    "bf16": torch.randn(5, generator=_GENERATOR).bfloat16(),
    "long": torch.arange(6).reshape(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "view": torch.arange(24.0).reshape(4, 6)[1:, ::2],
    "transposed": torch.randn(3, 5, generator=_GENERATOR).T,
    "parameter": torch.nn.Parameter(torch.randn(2, generator=_GENERATOR)),
}


def saved(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def test_every_tensor_is_what_torch_reads(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"model": OrderedDict(TENSORS), "note": ["a", 1, None]})
    content = load_lazily(path)
    assert content["note"] == ["a", 1, None]
    for name, expected in TENSORS.items():
        lazy = content["model"][name]
        assert isinstance(lazy, LazyTensor)
        assert lazy.info == (tuple(expected.shape), expected.dtype)
        assert torch.equal(lazy.read(), expected.detach()), name


def test_a_state_dict_is_read_with_its_metadata(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 3)
    content = load_lazily(saved(tmp_path / "x.pt", layer.state_dict()))
    assert torch.equal(content["weight"].read(), layer.weight)


def test_files_that_are_no_torch_files_say_what_they_are(tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("<!DOCTYPE html> key based authentication is not permitted")
    with pytest.raises(ConversionError, match="not a file of torch.save: it begins with b'<!DOC"):
        load_lazily(text)
    with pytest.raises(ConversionError, match="no such file"):
        load_lazily(tmp_path / "absent.pt")
    other = tmp_path / "other.pt"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(ConversionError, match="not one of torch.save"):
        load_lazily(other)
    old = tmp_path / "old.pt"
    torch.save(TENSORS, old, _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match="before version 1.6"):
        load_lazily(old)


def test_a_cut_or_changed_file_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"w": torch.arange(1000.0)})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConversionError, match="ends too early"):
        load_lazily(path)
    start = content.index(torch.arange(100.0, 110.0).numpy().tobytes())
    path.write_bytes(content[:start] + b"\xff" * 4 + content[start + 4 :])
    with pytest.raises(ConversionError, match=r"damaged at x/data/0.*again"):
        load_lazily(path)["w"].read()


def test_a_tensor_beyond_its_storage_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"w": torch.arange(1000.0)})
    _rewrite(path, "data/0", lambda record: record[:100])
    with pytest.raises(ConversionError, match=r"damaged at x/data/0.*again"):
        load_lazily(path)["w"].read()


def _rewrite(path: Path, ending: str, change: Callable[[bytes], bytes]) -> None:
    """Changes the record of a saved file whose name ends so."""
    with zipfile.ZipFile(path) as archive:
        records = {item: archive.read(item) for item in archive.namelist()}
    (name,) = (item for item in records if item.endswith(ending))
    records[name] = change(records[name])
    with zipfile.ZipFile(path, "w") as archive:
        for item, content in records.items():
            archive.writestr(item, content)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_objects_are_refused_unless_trusted(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"w": torch.ones(1), "bad": Harm(tmp_path / "harm")})
    with pytest.raises(ConversionError, match=r"mkdir.*can run code.*--trust-pickle"):
        load_lazily(path)
    assert not (tmp_path / "harm").exists()


class Choice(enum.Enum):
    """Stands for an enumeration of fairseq."""

    ONE = "one"


def _pickled_under(module: str, name: str, cls: type, path: Path) -> None:
    """Renames a class inside a saved file, so that its module cannot be imported."""
    old, new = f"c{cls.__module__}\n{cls.__name__}\n", f"c{module}\n{name}\n"

    def rename(pickled: bytes) -> bytes:
        assert old.encode() in pickled
        return pickled.replace(old.encode(), new.encode())

    _rewrite(path, "data.pkl", rename)


@pytest.mark.parametrize("kind", ["namespace", "omegaconf", "args"])
def test_options_in_objects_are_read_when_trusted(tmp_path: Path, kind: str) -> None:
    options = argparse.Namespace(decoder_attention_heads=32, choice=Choice.ONE)
    content = {"args": None, "cfg": {"model": options}, "model": {"w": torch.ones(2)}}
    if kind == "args":
        content |= {"args": options, "cfg": None}
    path = tmp_path / "x.pt"
    if kind == "omegaconf":
        omegaconf = pytest.importorskip("omegaconf")
        options.choice = "one"
        cfg = omegaconf.OmegaConf.create({"model": vars(options)})
        content["cfg"] = cfg
        torch.save(content, path)
    else:
        torch.save(content, path)
        _pickled_under("fairseq.dataclass.constants", "DDP_BACKEND", Choice, path)
    with pytest.raises(ConversionError, match="--trust-pickle"):
        FairseqFile(path)
    file = FairseqFile(path, trust=True)
    assert file.option("decoder_attention_heads") == 32
    assert file.option("no_such_option") is None
    assert torch.equal(file.read("w"), torch.ones(2))


def test_options_of_no_known_kind_state_nothing(tmp_path: Path) -> None:
    content = {"model": {"w": torch.ones(2)}, "cfg": "a text", "args": 3}
    assert FairseqFile(saved(tmp_path / "x.pt", content)).option("dropout") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, r"needs a key 'model'.*\['state_dict'\]"),
        ([1, 2], "holds list"),
        ({"model": {"w": 3}}, r"no tensors: \['w'\]"),
    ],
)
def test_other_containers_are_refused(tmp_path: Path, content, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        FairseqFile(saved(tmp_path / "x.pt", content))


def test_the_file_is_made_with_the_protocol_that_is_read(tmp_path: Path) -> None:
    """torch.save writes pickle protocol 2; newer ones are read as well."""
    path = tmp_path / "x.pt"
    torch.save({"model": TENSORS}, path, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    assert load_lazily(path)["model"].keys() == TENSORS.keys()
