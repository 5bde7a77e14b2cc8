"""`verify` and the Hugging Face commands as the command line runs them."""

from __future__ import annotations

import shutil

import torch

from megatron_kosmosg.conversion.import_fairseq import FairseqImport, import_fairseq
from tests.support.authors_files import HEADS, load_golden, weights_of, write_file
from tests.support.conversion_models import edit_weights, same_weights
from tools import convert_checkpoint


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["convert_checkpoint", *map(str, arguments)])
    return convert_checkpoint.main()


def test_verify_passes_and_fails(converted, monkeypatch, capsys, tmp_path) -> None:
    assert call(monkeypatch, "verify", "--a", converted.run, "--b", converted.exported) == 0
    printed = capsys.readouterr().out
    for name in ("hidden", "logits", "condition", "equal within 0.0001"):
        assert name in printed
    assert not torch.distributed.is_initialized()

    shutil.copytree(converted.exported, tmp_path / "hf")
    name = "text_model.model.layers.1.self_attn.v_proj.bias"
    # One of 32 numbers: the same shift of all would vanish in the LayerNorm that follows.
    edit_weights(tmp_path / "hf", lambda weights: weights[name][3].add_(0.01))
    assert call(monkeypatch, "verify", "--a", converted.exported, "--b", tmp_path / "hf") == 3
    assert "DIFFERENT" in capsys.readouterr().out
    assert call(monkeypatch, "verify", "--a", converted.run, "--b", tmp_path / "no") == 2
    assert "no finished checkpoint" in capsys.readouterr().err


def test_verify_reads_the_authors_files(monkeypatch, capsys, tmp_path) -> None:
    golden = load_golden(2)
    path = write_file(tmp_path / "final.pt", weights_of(golden, "final"), golden)
    import_fairseq(FairseqImport(path, tmp_path / "run", overrides=HEADS))
    sides = ["--a", path, "--b", tmp_path / "run"]
    assert call(monkeypatch, "verify", *sides, "--tolerance", 0, *HEADS) == 0
    assert "authors' file, stage instruct" in capsys.readouterr().out
    assert call(monkeypatch, "verify", *sides) == 2
    assert "model.vision.num_attention_heads" in capsys.readouterr().err


def test_models_of_other_sizes_are_not_compared(converted, monkeypatch, capsys, tmp_path) -> None:
    golden = load_golden(2)
    path = write_file(tmp_path / "final.pt", weights_of(golden, "final"), golden)
    assert call(monkeypatch, "verify", "--a", path, "--b", converted.exported, *HEADS) == 2
    assert "models of other sizes" in capsys.readouterr().err


def test_the_tool_exports_and_imports(converted, monkeypatch, capsys, tmp_path) -> None:
    hf, back = tmp_path / "hf", tmp_path / "back"
    arguments = [
        "--input",
        converted.run,
        "--output",
        hf,
        "--stable-diffusion",
        converted.sd,
        "--dtype",
        "bf16",
    ]
    assert call(monkeypatch, "export-hf", *arguments) == 0
    assert call(monkeypatch, "import-hf", "--input", hf, "--output", back) == 0
    assert str(back / "iter_0000000") in capsys.readouterr().out
    same_weights(back, converted.weights, torch.bfloat16)
    assert call(monkeypatch, "export-hf", *arguments) == 2
    assert "give a new folder" in capsys.readouterr().err
    wrong = ["import-hf", "--input", hf, "--output", tmp_path / "x", "model.vocab_size=5"]
    assert call(monkeypatch, *wrong) == 2
    assert "model.vocab_size=5 was given, but the model has 327" in capsys.readouterr().err
