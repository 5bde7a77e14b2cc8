"""Export to stock Hugging Face folders and back: every weight, in every dtype, or an error."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from megatron_kosmosg.conversion import export_hf as export_module
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.checkpoint_writer import write_checkpoint
from megatron_kosmosg.conversion.errors import ConversionError
from megatron_kosmosg.conversion.export_hf import export_hf, export_mllm
from megatron_kosmosg.conversion.import_hf import import_hf, import_kosmos2
from megatron_kosmosg.conversion.safetensors_files import SafetensorsFolder, write_safetensors
from megatron_kosmosg.conversion.tensors import InMemory
from megatron_kosmosg.inference.modeling_kosmosg_aligner import KosmosGAligner
from tests.conversion_models import TOKENIZER, VOCAB_SIZE, conversion_config, write_random
from tests.tiny_models import write_stable_diffusion

GROUNDING_TOKENS = 13
OF_TRANSFORMERS_4 = {
    "_name_or_path": "",
    "bad_words_ids": None,
    "do_sample": False,
    "early_stopping": False,
    "is_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "torch_dtype": None,
    "use_bfloat16": False,
}
"""Settings of the kind that config files of 2023 carry along."""
EMBEDDING = "text_model.model.embed_tokens.weight"


class World:
    """A tiny trained-looking world: checkpoints, Stable Diffusion, one export."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.sd = write_stable_diffusion(folder / "sd")
        self.run, self.exported = folder / "instruct", folder / "exported"
        self.config = conversion_config("instruct", folder)
        self.weights = write_random(self.run, self.config)
        self.notes = export_hf(self.run, self.sd, self.exported)
        self.pretrain, self.mllm = folder / "pretrain", folder / "mllm"
        self.language = write_random(self.pretrain, conversion_config("pretrain", folder))
        export_mllm(self.pretrain, self.mllm)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("hf"))


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


def same_weights(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    found = CheckpointTensors(folder)
    assert found.names().keys() == weights.keys()
    for name, wanted in weights.items():
        got = found.read(name)
        assert got.dtype == dtype and torch.equal(got, wanted.to(dtype)), name


def nothing_written(output: Path) -> bool:
    return not output.exists() and not list(output.parent.glob(f"{output.name}*"))


def test_stock_classes_take_every_weight(world) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(
        world.exported, subfolder="mllm", output_loading_info=True
    )
    assert not any(report.values()) and model.dtype == torch.float32
    assert type(model).__module__.startswith("transformers.models.kosmos2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(model.get_input_embeddings().weight) == VOCAB_SIZE
    aligner, report = KosmosGAligner.from_pretrained(
        world.exported / "aligner", output_loading_info=True
    )
    assert not any(report.values())
    assert aligner.config.num_queries == world.config.model.aligner.num_queries
    assert len(AutoTokenizer.from_pretrained(world.exported / "tokenizer")) == VOCAB_SIZE
    processor = AutoImageProcessor.from_pretrained(world.exported / "mllm_image_processor")
    assert dict(processor.crop_size) == {"height": 28, "width": 28}


def test_the_folder_names_stock_classes_and_two_files_of_its_own(world) -> None:
    index = json.loads((world.exported / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_kosmosg", "KosmosGPipeline"]
    assert index["mllm"] == ["transformers", "Kosmos2ForConditionalGeneration"]
    assert index["aligner"] == ["modeling_kosmosg_aligner", "KosmosGAligner"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["text_encoder"] == [None, None]
    code = sorted(p.relative_to(world.exported).as_posix() for p in world.exported.rglob("*.py"))
    assert code == ["aligner/modeling_kosmosg_aligner.py", "pipeline_kosmosg.py"]
    for part in ("unet", "vae"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        copied, original = load_file(world.exported / file), load_file(world.sd / file)
        assert copied.keys() == original.keys()
        assert all(torch.equal(copied[name], original[name]) for name in original)


def test_there_and_back_is_bit_equal(world, tmp_path) -> None:
    imported = import_hf(world.exported, tmp_path / "back")
    same_weights(tmp_path / "back", world.weights, torch.float32)
    config = CheckpointTensors(imported.checkpoint).config
    assert config.stage == "instruct" and config.data.seq_length == world.config.data.seq_length
    for part in ("vocab_size", "decoder", "vision", "aligner"):
        assert getattr(config.model, part) == getattr(world.config.model, part), part


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_there_and_back_in_16_bits(world, tmp_path, dtype) -> None:
    export_hf(world.run, world.sd, tmp_path / "hf", dtype)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", subfolder="mllm")
    assert model.dtype == dtype
    assert {t.dtype for t in load_file(_weights(tmp_path / "hf" / "unet")).values()} == {dtype}
    import_hf(tmp_path / "hf", tmp_path / "back")
    same_weights(tmp_path / "back", world.weights, dtype)


@pytest.mark.parametrize("kind", ["decoder_only", "none"])
def test_other_aligners_there_and_back(world, tmp_path, kind) -> None:
    config = conversion_config("instruct", tmp_path, kind)
    weights = write_random(tmp_path / "run", config)
    export_hf(tmp_path / "run", world.sd, tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "back")
    same_weights(tmp_path / "back", weights, torch.float32)


def test_the_language_model_alone_there_and_back(world, tmp_path) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(
        world.mllm, output_loading_info=True
    )
    assert not any(report.values())
    assert len(AutoTokenizer.from_pretrained(world.mllm)) == len(
        model.get_input_embeddings().weight
    )
    import_hf(world.mllm, tmp_path / "back")
    same_weights(tmp_path / "back", world.language, torch.float32)
    assert CheckpointTensors(tmp_path / "back").stage == "pretrain"


def test_align_checkpoints_lose_n_and_say_so(world, tmp_path) -> None:
    config = conversion_config("align", tmp_path)
    weights = write_random(tmp_path / "run", config)
    notes = export_hf(tmp_path / "run", world.sd, tmp_path / "hf")
    left_out = [name for name in weights if name.startswith("aligner_n.")]
    assert notes[4].startswith(f"not exported: {len(left_out)} tensors of AlignerNet N")
    assert any("aligner_n.decoder.layers.[0-2].mlp.linear_fc1.weight" in note for note in notes)
    import_hf(tmp_path / "hf", tmp_path / "back")
    kept = {name: value for name, value in weights.items() if name not in left_out}
    same_weights(tmp_path / "back", kept, torch.float32)


def test_shards_hold_no_more_than_asked_and_load(world, tmp_path) -> None:
    source = SafetensorsFolder(world.exported / "mllm", "model")
    limit, done = 40_000, []
    write_safetensors(tmp_path, "model", source, lambda *now: done.append(now), limit)
    shutil.copyfile(world.exported / "mllm" / "config.json", tmp_path / "config.json")
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


def _kosmos2(world: World, folder: Path) -> Path:
    """The layout of microsoft/kosmos-2: more tokens, the slow tokenizer's files, a stray buffer."""
    shutil.copytree(world.mllm, folder)
    weights = load_file(folder / "model.safetensors")
    table = weights[EMBEDDING]
    weights[EMBEDDING] = torch.cat([table, torch.randn(GROUNDING_TOKENS, table.shape[1])])
    weights["vision_model.model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "vocab_size": VOCAB_SIZE + GROUNDING_TOKENS,
        **OF_TRANSFORMERS_4,
    }
    config |= {"torch_dtype": "float32", "transformers_version": "4.34.0.dev0"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    like = tokenizer["added_tokens"][-1]
    for number in range(GROUNDING_TOKENS):
        extra = {**like, "id": VOCAB_SIZE + number, "content": f"<patch_{number}>"}
        tokenizer["added_tokens"].append(extra)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_kosmos2_is_a_start_for_pretrain(world, tmp_path) -> None:
    imported = import_kosmos2(_kosmos2(world, tmp_path / "kosmos2"), tmp_path / "run")
    same_weights(tmp_path / "run", world.language, torch.float32)
    assert "kept the first 327 of 340 embedding rows" in imported.notes[1]
    config = CheckpointTensors(tmp_path / "run").config
    assert (config.stage, config.model.vocab_size) == ("pretrain", VOCAB_SIZE)


def test_kosmos2_with_another_tokenizer_is_refused(world, tmp_path) -> None:
    folder = _kosmos2(world, tmp_path / "kosmos2")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces[100], pieces[101] = pieces[101], pieces[100]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConversionError, match="id 100 is .* embedding rows would belong"):
        import_kosmos2(folder, tmp_path / "run")
    assert nothing_written(tmp_path / "run")


def test_a_pretrain_checkpoint_is_sent_to_export_mllm(world, tmp_path) -> None:
    with pytest.raises(ConversionError, match="export-mllm writes its language model"):
        export_hf(world.pretrain, world.sd, tmp_path / "hf")
    assert nothing_written(tmp_path / "hf")


@pytest.mark.parametrize(
    ("part", "file", "change", "message"),
    [
        ("unet", "config.json", {"cross_attention_dim": 32}, "width 32, AlignerNet makes width 24"),
        ("unet", "config.json", {"in_channels": 9}, "9 channels, the VAE makes 4"),
        ("text_encoder", "config.json", {"max_position_embeddings": 77}, "77 positions .* makes 7"),
        ("vae", "config.json", {"_class_name": "VQModel"}, "a AutoencoderKL is needed"),
        ("scheduler", "scheduler_config.json", None, "scheduler_config.json; --sd takes"),
        ("vae", "diffusion_pytorch_model.safetensors", None, "save the folder once with diffusers"),
    ],
)
def test_a_stable_diffusion_that_does_not_fit(world, tmp_path, part, file, change, message) -> None:
    sd = tmp_path / "sd"
    shutil.copytree(world.sd, sd)
    if change is None:
        (sd / part / file).unlink()
    else:
        path = sd / part / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConversionError, match=message):
        export_hf(world.run, sd, tmp_path / "hf")
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
    _edit_weights(folder, lambda weights: weights.pop("text_model.model.layer_norm.bias"))


def _add_tensor(folder: Path) -> None:
    _edit_weights(folder, lambda weights: weights.update(surprise=torch.zeros(2)))


def _other_size(folder: Path) -> None:
    name = "image_to_text_projection.latent_query"
    _edit_weights(folder, lambda weights: weights.update({name: torch.zeros(4, 32)}))


def _untied_head(folder: Path) -> None:
    head = {"text_model.lm_head.weight": torch.zeros(VOCAB_SIZE, 32)}
    _edit_weights(folder, lambda weights: weights.update(head))


def _edit_weights(folder: Path, edit) -> None:
    path = folder / "mllm" / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"\u2581triangle"', '"\u2581square2"'))


def _other_model(folder: Path) -> None:
    path = folder / "mllm" / "config.json"
    path.write_text(path.read_text().replace('"kosmos-2"', '"llava"'))


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
        (_other_model, "a model of type 'llava', not 'kosmos-2'"),
    ],
)
def test_damaged_folders_are_refused(world, tmp_path, damage, message) -> None:
    shutil.copytree(world.exported, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ConversionError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "back")
    assert nothing_written(tmp_path / "back")


def test_an_interrupted_export_leaves_nothing(world, tmp_path, monkeypatch) -> None:
    def interrupt(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module.hf_folder, "write_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_hf(world.run, world.sd, tmp_path / "hf")
    assert nothing_written(tmp_path / "hf")
    monkeypatch.undo()
    export_hf(world.run, world.sd, tmp_path / "hf")
    with pytest.raises(ConversionError, match="hf exists; give a new folder"):
        export_hf(world.run, world.sd, tmp_path / "hf")


def test_numbers_too_large_for_fp16_are_not_made_infinite(world, tmp_path) -> None:
    config = conversion_config("instruct", tmp_path)
    weights = {**world.weights, "resampler.dense.bias": torch.full((32,), 1e6)}
    write_checkpoint(tmp_path / "run", config, InMemory(weights))
    with pytest.raises(ConversionError, match="up to 1e.06, too large for float16"):
        export_hf(tmp_path / "run", world.sd, tmp_path / "hf", torch.float16)
    assert nothing_written(tmp_path / "hf")


def test_a_vocabulary_that_is_not_the_tokenizers(world, tmp_path) -> None:
    shutil.copytree(world.run, tmp_path / "run")
    path = next((tmp_path / "run").glob("iter_*/config.yaml"))
    path.write_text(path.read_text().replace(str(TOKENIZER), str(tmp_path / "gone.model")))
    listing = path.with_name("complete.json")
    sizes = json.loads(listing.read_text())
    sizes["files"]["config.yaml"] = path.stat().st_size
    listing.write_text(json.dumps(sizes))
    with pytest.raises(ConversionError, match="gone.model .*--tokenizer-model"):
        export_hf(tmp_path / "run", world.sd, tmp_path / "hf")
    export_hf(tmp_path / "run", world.sd, tmp_path / "hf", tokenizer=TOKENIZER)


def test_verify_passes_and_fails(world, tool, monkeypatch, capsys, tmp_path) -> None:
    assert call(tool, monkeypatch, "verify", "--a", world.run, "--b", world.exported) == 0
    printed = capsys.readouterr().out
    for name in ("hidden", "logits", "condition", "equal within 0.0001"):
        assert name in printed
    assert not torch.distributed.is_initialized()

    shutil.copytree(world.exported, tmp_path / "hf")
    name = "text_model.model.layers.1.self_attn.v_proj.bias"
    # One of 32 numbers: the same shift of all would vanish in the LayerNorm that follows.
    _edit_weights(tmp_path / "hf", lambda weights: weights[name][3].add_(0.01))
    assert call(tool, monkeypatch, "verify", "--a", world.exported, "--b", tmp_path / "hf") == 1
    assert "DIFFERENT" in capsys.readouterr().out
    assert call(tool, monkeypatch, "verify", "--a", world.run, "--b", tmp_path / "no") == 2
    assert "no finished checkpoint" in capsys.readouterr().err


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
