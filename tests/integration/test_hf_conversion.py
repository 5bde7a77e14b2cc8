"""Export to stock Hugging Face folders and back: every weight, in every dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.export_hf import export_hf
from megatron_kosmosg.conversion.import_hf import import_hf, import_kosmos2
from megatron_kosmosg.conversion.model_card import TESTED
from megatron_kosmosg.conversion.safetensors_files import SafetensorsFolder, write_safetensors
from megatron_kosmosg.data.sequence import SequenceFormat
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.hf.modeling_kosmosg_aligner import KosmosGAligner
from megatron_kosmosg.inference.trained_model import build_prompt
from tests.support.conversion_models import (
    TOKENIZER,
    VOCAB_SIZE,
    conversion_config,
    nothing_written,
    same_weights,
    write_random,
)
from tests.support.public_folders import write_kosmos2
from tests.support.tiny_pipeline import prompt_image


def test_stock_classes_take_every_weight(converted) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(
        converted.exported, subfolder="mllm", output_loading_info=True
    )
    assert not any(report.values()) and model.dtype == torch.float32
    assert type(model).__module__.startswith("transformers.models.kosmos2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(model.get_input_embeddings().weight) == VOCAB_SIZE
    aligner, report = KosmosGAligner.from_pretrained(
        converted.exported / "aligner", output_loading_info=True
    )
    assert not any(report.values())
    assert aligner.config.num_queries == converted.config.model.aligner.num_queries
    assert len(AutoTokenizer.from_pretrained(converted.exported / "tokenizer")) == VOCAB_SIZE
    processor = AutoImageProcessor.from_pretrained(converted.exported / "mllm_image_processor")
    assert dict(processor.crop_size) == {"height": 28, "width": 28}


def test_the_folder_names_stock_classes_and_two_files_of_its_own(converted) -> None:
    index = json.loads((converted.exported / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_kosmosg", "KosmosGPipeline"]
    assert index["mllm"] == ["transformers", "Kosmos2ForConditionalGeneration"]
    assert index["aligner"] == ["modeling_kosmosg_aligner", "KosmosGAligner"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["text_encoder"] == [None, None]
    folder = converted.exported
    code = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    assert code == ["aligner/modeling_kosmosg_aligner.py", "pipeline_kosmosg.py"]
    for part in ("unet", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        copied, original = load_file(converted.exported / file), load_file(converted.sd / file)
        assert copied.keys() == original.keys()
        assert all(torch.equal(copied[name], original[name]) for name in original)


def test_the_folders_say_which_versions_read_them(converted) -> None:
    for folder in (converted.exported, converted.mllm):
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: ") and "{" not in card
        for name, (oldest, newest) in TESTED.items():
            assert f"| {name} | {oldest} | {newest} |" in card
        assert "x_attn.is_causal = False" in card


def test_there_and_back_is_bit_equal(converted, tmp_path) -> None:
    imported = import_hf(converted.exported, tmp_path / "back")
    same_weights(tmp_path / "back", converted.weights, torch.float32)
    config = CheckpointTensors(imported.checkpoint).config
    assert config.stage == "instruct" and config.data.seq_length == converted.config.data.seq_length
    for part in ("vocab_size", "decoder", "vision", "aligner"):
        assert getattr(config.model, part) == getattr(converted.config.model, part), part


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_there_and_back_in_16_bits(converted, tmp_path, dtype) -> None:
    export_hf(converted.run, converted.sd, tmp_path / "hf", dtype)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", subfolder="mllm")
    assert model.dtype == dtype
    assert {t.dtype for t in load_file(_weights(tmp_path / "hf" / "unet")).values()} == {dtype}
    import_hf(tmp_path / "hf", tmp_path / "back")
    same_weights(tmp_path / "back", converted.weights, dtype)


@pytest.mark.parametrize("kind", ["decoder_only", "none"])
def test_other_aligners_there_and_back(converted, tmp_path, kind) -> None:
    config = conversion_config("instruct", tmp_path, kind)
    weights = write_random(tmp_path / "run", config)
    export_hf(tmp_path / "run", converted.sd, tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "back")
    same_weights(tmp_path / "back", weights, torch.float32)


def test_the_language_model_alone_there_and_back(converted, tmp_path) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(
        converted.mllm, output_loading_info=True
    )
    assert not any(report.values())
    assert len(AutoTokenizer.from_pretrained(converted.mllm)) == len(
        model.get_input_embeddings().weight
    )
    import_hf(converted.mllm, tmp_path / "back")
    same_weights(tmp_path / "back", converted.language, torch.float32)
    assert CheckpointTensors(tmp_path / "back").stage == "pretrain"


@torch.no_grad()
@pytest.mark.parametrize("texts", [["a red dog"], ["a red dog", "a"]])
def test_the_stock_processor_says_what_training_says(converted, texts) -> None:
    """Its ids in an image's place are others, but no one reads them: the logits are equal."""
    dog = prompt_image(1)
    processor = AutoProcessor.from_pretrained(converted.mllm)
    inputs = processor(text=texts, images=[dog] * len(texts), return_tensors="pt", padding=True)
    model = AutoModelForImageTextToText.from_pretrained(converted.mllm)
    slots = converted.config.model.resampler.num_latent_queries
    found = model(**inputs).logits
    for row, text in enumerate(texts):
        prompt = build_prompt([dog, text], SequenceFormat(Tokenizer(TOKENIZER), slots))
        length = len(prompt.tokens)
        mask = torch.from_numpy(prompt.image_mask)[None]
        assert inputs["image_embeds_position_mask"][row, :length].bool().equal(mask[0])
        expected = model(
            pixel_values=inputs["pixel_values"][row : row + 1],
            input_ids=torch.from_numpy(prompt.tokens)[None].long(),
            image_embeds_position_mask=mask,
        ).logits[0]
        torch.testing.assert_close(found[row, :length], expected, rtol=0, atol=1e-5)


def test_align_checkpoints_lose_n_and_say_so(converted, tmp_path) -> None:
    config = conversion_config("align", tmp_path)
    weights = write_random(tmp_path / "run", config)
    notes = export_hf(tmp_path / "run", converted.sd, tmp_path / "hf")
    left_out = [name for name in weights if name.startswith("aligner_n.")]
    assert notes[4].startswith(f"not exported: {len(left_out)} tensors of AlignerNet N")
    assert any("aligner_n.decoder.layers.[0-2].mlp.linear_fc1.weight" in note for note in notes)
    import_hf(tmp_path / "hf", tmp_path / "back")
    kept = {name: value for name, value in weights.items() if name not in left_out}
    same_weights(tmp_path / "back", kept, torch.float32)


def test_shards_hold_no_more_than_asked_and_load(converted, tmp_path) -> None:
    source = SafetensorsFolder(converted.exported / "mllm", "model")
    limit, done = 40_000, []
    write_safetensors(tmp_path, "model", source, lambda *now: done.append(now), limit)
    shutil.copyfile(converted.exported / "mllm" / "config.json", tmp_path / "config.json")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3 and done[-1][0] == done[-1][1]
    for shard in shards:
        assert shard.stat().st_mode == (tmp_path / "config.json").stat().st_mode
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    again = SafetensorsFolder(tmp_path, "model")
    assert again.names() == source.names()
    assert all(torch.equal(again.read(name), source.read(name)) for name in source.names())


def _weights(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def test_kosmos2_is_a_start_for_pretrain(converted, tmp_path) -> None:
    imported = import_kosmos2(write_kosmos2(converted.mllm, tmp_path / "kosmos2"), tmp_path / "run")
    same_weights(tmp_path / "run", converted.language, torch.float32)
    assert "kept the first 327 of 340 embedding rows" in imported.notes[1]
    config = CheckpointTensors(tmp_path / "run").config
    assert (config.stage, config.model.vocab_size) == ("pretrain", VOCAB_SIZE)


def test_kosmos2_with_another_tokenizer_is_refused(converted, tmp_path) -> None:
    folder = write_kosmos2(converted.mllm, tmp_path / "kosmos2")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces[100], pieces[101] = pieces[101], pieces[100]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConversionError, match="id 100 is .* embedding rows would belong"):
        import_kosmos2(folder, tmp_path / "run")
    assert nothing_written(tmp_path / "run")
