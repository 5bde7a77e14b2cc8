"""Bad input of the Hugging Face conversions: an error that names it, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion import export_hf as export_module
from megatron_kosmosg.conversion.checkpoint_writer import write_checkpoint
from megatron_kosmosg.conversion.export_hf import export_hf
from megatron_kosmosg.conversion.import_hf import import_hf
from megatron_kosmosg.conversion.safetensors_files import write_safetensors
from megatron_kosmosg.conversion.tensors import InMemory
from tests.support.conversion_models import (
    TOKENIZER,
    VOCAB_SIZE,
    conversion_config,
    edit_weights,
    nothing_written,
)


def test_a_pretrain_checkpoint_is_sent_to_export_mllm(converted, tmp_path) -> None:
    with pytest.raises(ConversionError, match="export-mllm writes its language model"):
        export_hf(converted.pretrain, converted.sd, tmp_path / "hf")
    assert nothing_written(tmp_path / "hf")


@pytest.mark.parametrize(
    ("part", "file", "change", "message"),
    [
        ("unet", "config.json", {"cross_attention_dim": 32}, "width 32, AlignerNet makes width 24"),
        ("unet", "config.json", {"in_channels": 9}, "9 channels, the VAE makes 4"),
        ("text_encoder", "config.json", {"max_position_embeddings": 77}, "77 positions .* makes 7"),
        ("vae", "config.json", {"_class_name": "VQModel"}, "a AutoencoderKL is needed"),
        (
            "scheduler",
            "scheduler_config.json",
            None,
            "scheduler_config.json; --stable-diffusion takes",
        ),
        (
            "scheduler",
            "scheduler_config.json",
            {"_class_name": None},
            "None, which is no scheduler",
        ),
        (
            "scheduler",
            "scheduler_config.json",
            {"_class_name": "New"},
            "New, which is no scheduler",
        ),
        ("vae", "diffusion_pytorch_model.safetensors", None, "save the folder once with diffusers"),
    ],
)
def test_a_stable_diffusion_that_does_not_fit(
    converted, tmp_path, part, file, change, message
) -> None:
    sd = tmp_path / "sd"
    shutil.copytree(converted.sd, sd)
    if change is None:
        (sd / part / file).unlink()
    else:
        path = sd / part / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConversionError, match=message):
        export_hf(converted.run, sd, tmp_path / "hf")
    assert nothing_written(tmp_path / "hf")


def _truncate(folder: Path) -> None:
    path = folder / "mllm" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _lose_shard(folder: Path) -> None:
    path = folder / "mllm" / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    write_safetensors(folder / "mllm", "model", InMemory(weights), None, 40_000)
    min((folder / "mllm").glob("model-*.safetensors")).unlink()


def _lose_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("text_model.model.layer_norm.bias"))


def _add_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update(surprise=torch.zeros(2)))


def _other_size(folder: Path) -> None:
    name = "image_to_text_projection.latent_query"
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(4, 32)}))


def _untied_head(folder: Path) -> None:
    head = {"text_model.lm_head.weight": torch.zeros(VOCAB_SIZE, 32)}
    edit_weights(folder, lambda weights: weights.update(head))


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"\u2581triangle"', '"\u2581square2"'))


def _other_model(folder: Path) -> None:
    path = folder / "mllm" / "config.json"
    path.write_text(path.read_text().replace('"kosmos-2"', '"llava"'))


def _list_as_config(folder: Path) -> None:
    (folder / "aligner" / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model.safetensors is no whole safetensors file .*download it again"),
        (_lose_shard, "lacks model-00001-of-.*, which model.safetensors.index.json names"),
        (_lose_tensor, "1 tensor missing:\n.*text_model.model.layer_norm.bias"),
        (_add_tensor, "1 tensor without a place in the model:\n.*surprise"),
        (_other_size, r"latent_query has shape \[4, 32\], the model needs \[5, 32\]"),
        (_untied_head, "lm_head.weight differs from .*ties the two"),
        (_other_tokenizer, "'\u2581square2' there and '\u2581triangle' here"),
        (_list_as_config, "aligner/config.json holds a list, not a JSON object"),
        (_other_model, "a model of type 'llava', not 'kosmos-2'"),
    ],
)
def test_damaged_folders_are_refused(converted, tmp_path, damage, message) -> None:
    shutil.copytree(converted.exported, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ConversionError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "back")
    assert nothing_written(tmp_path / "back")


def test_an_interrupted_export_leaves_nothing(converted, tmp_path, monkeypatch) -> None:
    def interrupt(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module.hf_folder, "write_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_hf(converted.run, converted.sd, tmp_path / "hf")
    assert nothing_written(tmp_path / "hf")
    monkeypatch.undo()
    export_hf(converted.run, converted.sd, tmp_path / "hf")
    with pytest.raises(ConversionError, match="hf exists; give a new folder"):
        export_hf(converted.run, converted.sd, tmp_path / "hf")


def test_numbers_too_large_for_fp16_are_not_made_infinite(converted, tmp_path) -> None:
    config = conversion_config("instruct", tmp_path)
    weights = {**converted.weights, "resampler.dense.bias": torch.full((32,), 1e6)}
    write_checkpoint(tmp_path / "run", config, InMemory(weights))
    with pytest.raises(ConversionError, match="up to 1e.06, too large for float16"):
        export_hf(tmp_path / "run", converted.sd, tmp_path / "hf", torch.float16)
    assert nothing_written(tmp_path / "hf")


def test_a_vocabulary_that_is_not_the_tokenizers(converted, tmp_path) -> None:
    shutil.copytree(converted.run, tmp_path / "run")
    path = next((tmp_path / "run").glob("iter_*/config.yaml"))
    path.write_text(path.read_text().replace(str(TOKENIZER), str(tmp_path / "gone.model")))
    listing = path.with_name("complete.json")
    whole = json.loads(listing.read_text())
    whole["files"]["config.yaml"] = path.stat().st_size
    del whole["digests"]["config.yaml"]
    listing.write_text(json.dumps(whole))
    with pytest.raises(ConversionError, match="gone.model .*--tokenizer-model"):
        export_hf(tmp_path / "run", converted.sd, tmp_path / "hf")
    export_hf(tmp_path / "run", converted.sd, tmp_path / "hf", tokenizer=TOKENIZER)
