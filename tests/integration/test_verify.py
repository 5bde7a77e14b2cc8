"""`verify` and the Hugging Face commands as the command line runs them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from megatron_kosmosg.conversion.import_fairseq import FairseqImport, import_fairseq
from tests.authors_files import HEADS, load_golden, weights_of, write_file
from tests.conversion_models import ConversionWorld, edit_weights, same_weights


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ConversionWorld:
    return ConversionWorld(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(tool, monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["convert_checkpoint", *map(str, arguments)])
    return tool.main()


def test_verify_passes_and_fails(world, tool, monkeypatch, capsys, tmp_path) -> None:
    assert call(tool, monkeypatch, "verify", "--a", world.run, "--b", world.exported) == 0
    printed = capsys.readouterr().out
    for name in ("hidden", "logits", "condition", "equal within 0.0001"):
        assert name in printed
    assert not torch.distributed.is_initialized()

    shutil.copytree(world.exported, tmp_path / "hf")
    name = "text_model.model.layers.1.self_attn.v_proj.bias"
    # One of 32 numbers: the same shift of all would vanish in the LayerNorm that follows.
    edit_weights(tmp_path / "hf", lambda weights: weights[name][3].add_(0.01))
    assert call(tool, monkeypatch, "verify", "--a", world.exported, "--b", tmp_path / "hf") == 1
    assert "DIFFERENT" in capsys.readouterr().out
    assert call(tool, monkeypatch, "verify", "--a", world.run, "--b", tmp_path / "no") == 2
    assert "no finished checkpoint" in capsys.readouterr().err


def test_verify_reads_the_authors_files(tool, monkeypatch, capsys, tmp_path) -> None:
    golden = load_golden(2)
    path = write_file(tmp_path / "final.pt", weights_of(golden, "final"), golden)
    import_fairseq(FairseqImport(path, tmp_path / "run", overrides=HEADS))
    sides = ["--a", path, "--b", tmp_path / "run"]
    assert call(tool, monkeypatch, "verify", *sides, "--tolerance", 0, *HEADS) == 0
    assert "authors' file, stage instruct" in capsys.readouterr().out
    assert call(tool, monkeypatch, "verify", *sides) == 2
    assert "model.vision.num_attention_heads" in capsys.readouterr().err


def test_models_of_other_sizes_are_not_compared(world, tool, monkeypatch, capsys, tmp_path) -> None:
    golden = load_golden(2)
    path = write_file(tmp_path / "final.pt", weights_of(golden, "final"), golden)
    assert call(tool, monkeypatch, "verify", "--a", path, "--b", world.exported, *HEADS) == 2
    assert "models of other sizes" in capsys.readouterr().err


def test_the_tool_exports_and_imports(world, tool, monkeypatch, capsys, tmp_path) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    given = ["--input", world.run, "--output", hf, "--sd", world.sd, "--dtype", "bf16"]
    assert call(tool, monkeypatch, "export-hf", *given) == 0
    assert call(tool, monkeypatch, "import-hf", "--input", hf, "--output", back) == 0
    assert str(back / "iter_0000000") in capsys.readouterr().out
    same_weights(back, world.weights, torch.bfloat16)
    assert call(tool, monkeypatch, "export-hf", *given) == 2
    assert "give a new folder" in capsys.readouterr().err
    wrong = ["import-hf", "--input", hf, "--output", tmp_path / "x", "model.vocab_size=5"]
    assert call(tool, monkeypatch, *wrong) == 2
    assert "model.vocab_size=5 was given, but the model has 327" in capsys.readouterr().err
