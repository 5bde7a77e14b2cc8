"""The authors' files, imported by the tool's own code, give the authors' numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from megatron_kosmosg.checkpoint.folder import CONFIG_FILE
from megatron_kosmosg.checkpoint.save_and_resume import checkpoint_metadata
from megatron_kosmosg.checkpoint.weights import load_weights
from megatron_kosmosg.config.load import load_config
from megatron_kosmosg.config.schema import FrozenFolder, RunConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.import_fairseq import FairseqImport, import_fairseq
from megatron_kosmosg.inference.trained_model import TrainedModel, single_process
from megatron_kosmosg.models.kosmosg import KosmosG
from megatron_kosmosg.parallel.context import ParallelContext
from megatron_kosmosg.stages import build_stage, stage_facts
from tests.support import authors_files as authors
from tests.support.data_helpers import write_tokenizer
from tests.support.tiny_models import write_stable_diffusion

STAGES = {"stage1": "pretrain", "stage2": "align", "final": "instruct"}


@pytest.fixture(scope="module")
def golden() -> dict:
    """Three layers and an odd vocabulary."""
    torch.set_num_threads(1)
    return authors.load_golden(2)


def imported(folder: Path, file: Path, **more) -> Path:
    """Checkpoint folder of the imported file."""
    job = FairseqImport(input=file, output=folder / "imported", overrides=authors.HEADS, **more)
    return import_fairseq(job).checkpoint


def outputs(checkpoint: Path, golden: dict) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """What the model of the checkpoint gives for the golden inputs."""
    config = load_config(checkpoint / CONFIG_FILE, [])
    with single_process(config) as context:
        model = _model(config, context)
        load_weights(checkpoint, [model], checkpoint_metadata(context))
        inputs = golden["inputs"]
        with torch.no_grad():
            found = model(
                inputs["tokens"], inputs["image_slots"], inputs["tokens"] == 1, inputs["images"]
            )
            features = model.resampler(model.vision_encoder(inputs["images"]))
    if "logits" in found:
        found["logits"] = found["logits"].transpose(0, 1)[..., : golden["vocab_size"]]
    return config, found | {"image_features": features.flatten(0, 1)}


def _model(config: RunConfig, context: ParallelContext) -> KosmosG:
    facts = stage_facts(config.stage)
    return KosmosG(
        config, context, output_head=facts.has_output_head, aligner_parts=facts.aligner_parts
    ).eval()


def close(found: dict[str, torch.Tensor], golden: dict, tolerance: float = 1e-5) -> None:
    """Every output that the golden file has is as the authors' code computed it."""
    compared = golden["outputs"].keys() & found.keys()
    assert {"image_features", "hidden"} <= compared
    for name in compared:
        expected = golden["outputs"][name]
        error = (found[name] - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name}: off by {error:.1e} of the maximum"


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("file", STAGES)
def test_each_file_gives_the_authors_outputs(tmp_path: Path, file: str, index: int) -> None:
    golden = authors.load_golden(index)
    path = authors.write_file(tmp_path / "checkpoint.pt", authors.weights_of(golden, file), golden)
    config, found = outputs(imported(tmp_path, path), golden)
    assert config.stage == STAGES[file] and config.training.precision == "fp32"
    assert ("logits" in found) == (file == "stage1")
    assert ("condition" in found) == (file != "stage1")
    close(found, golden)
    if file == "stage2":
        hidden, expected = found["hidden"], golden["outputs"]
        mse = (found["condition"] - golden["inputs"]["clip_embed"]).square().mean()
        scale = 77 / hidden.shape[1]
        rec = scale * (found["reconstruction"] - hidden).square().mean()
        torch.testing.assert_close(mse, expected["mse_loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(rec, expected["rec_loss"], rtol=1e-5, atol=0)


def test_half_precision_is_kept_bit_by_bit(tmp_path: Path, golden: dict) -> None:
    half = {name: value.half() for name, value in authors.weights_of(golden, "final").items()}
    path = authors.write_file(tmp_path / "checkpoint.pt", half, golden)
    checkpoint = imported(tmp_path, path)
    stored = CheckpointTensors(checkpoint)
    assert {info.dtype for info in stored.names().values()} == {torch.float16}
    kept = stored.read("decoder.layers.1.mlp.linear_fc1.weight")
    assert torch.equal(kept, half["gpt_model.decoder.layers.1.ffn.fc1.weight"])
    config, found = outputs(checkpoint, golden)
    assert config.training.precision == "fp16"
    rounded = {name: value.float() for name, value in half.items()}
    path = authors.write_file(tmp_path / "rounded.pt", rounded, golden)
    (tmp_path / "second").mkdir()
    _, expected = outputs(imported(tmp_path / "second", path), golden)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2e-2 * value.abs().max(), name


@pytest.mark.parametrize("source", ["fused in the file", "clip file", "clip file, wrapped"])
def test_fused_image_attention_is_split(tmp_path: Path, golden: dict, source: str) -> None:
    tensors, vision = authors.fuse_tower(authors.weights_of(golden, "stage1")), None
    if source.startswith("clip"):
        tensors = authors.without_tower(tensors)

        def wrap(clip: dict) -> dict:
            if not source.endswith("wrapped"):
                return clip
            return {"state_dict": {f"module.{name}": value for name, value in clip.items()}}

        vision = authors.clip_file(tmp_path / "clip.pt", golden, wrap)
    path = authors.write_file(tmp_path / "checkpoint.pt", tensors, golden)
    close(outputs(imported(tmp_path, path, vision=vision), golden)[1], golden)


def test_a_trained_block_of_the_file_wins_over_the_clip_file(tmp_path: Path, golden) -> None:
    tensors = authors.weights_of(golden, "stage1")
    trained = {n: t for n, t in tensors.items() if ".resblocks.2." in n or ".ln_post." in n}
    path = authors.write_file(
        tmp_path / "checkpoint.pt", authors.without_tower(tensors) | trained, golden
    )
    changed = dict(golden, model={n: t + (n in trained) for n, t in golden["model"].items()})
    vision = authors.clip_file(tmp_path / "clip.pt", changed)
    close(outputs(imported(tmp_path, path, vision=vision), golden)[1], golden)


def _frozen_parts(folder: Path, golden: dict) -> Path:
    """A Stable Diffusion of the golden model's condition."""
    write_stable_diffusion(folder)
    sizes = golden["sizes"]
    text = CLIPTextConfig(
        vocab_size=53, hidden_size=sizes["al_dim"], intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=sizes["cond_tokens"],
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    return folder


@pytest.mark.parametrize(("file", "following"), [("stage1", "align"), ("stage2", "instruct")])
def test_the_next_stage_starts_from_an_imported_file(
    tmp_path: Path, golden: dict, file: str, following: str
) -> None:
    frozen = FrozenFolder(str(_frozen_parts(tmp_path / "sd", golden)))
    path = authors.write_file(tmp_path / "checkpoint.pt", authors.weights_of(golden, file), golden)
    checkpoint = imported(tmp_path, path)
    sizes = golden["sizes"]
    aligner = {  # a stage 1 file does not show them
        "num_layers": sizes["al_layers"],
        "hidden_size": sizes["al_dim"],
        "ffn_hidden_size": sizes["al_ffn"],
        "num_attention_heads": sizes["al_heads"],
        "num_queries": sizes["cond_tokens"],
        "max_positions": sizes["max_pos"],
    }
    overrides = [f"model.aligner.{key}={value}" for key, value in aligner.items()]
    overrides += [f"stage={following}", f"checkpoint.load={checkpoint.parent}"]
    config = load_config(checkpoint / CONFIG_FILE, overrides)
    model_config = dataclasses.replace(config.model, diffusion=frozen, clip_text=frozen)
    config = dataclasses.replace(config, model=model_config)
    with single_process(config) as context:
        stage = build_stage(config, context)
        chunks = stage.build_model(context)
        initial = stage.initial_weights()
        load_weights(
            checkpoint, chunks, checkpoint_metadata(context),
            initial.absent, initial.unused, initial.stage,
        )  # fmt: skip
        loaded = chunks[0].state_dict()["decoder.layers.2.mlp.linear_fc2.weight"]
    assert torch.equal(loaded, golden["model"]["gpt_model.decoder.layers.2.ffn.fc2.weight"])


def test_a_prompt_is_answered_from_an_imported_file(tmp_path: Path, golden: dict) -> None:
    model = _tokenizer_of(tmp_path, golden["vocab_size"])
    frozen = _frozen_parts(tmp_path / "sd", golden)
    path = authors.write_file(
        tmp_path / "checkpoint.pt", authors.weights_of(golden, "final"), golden
    )
    job = FairseqImport(
        input=path, output=tmp_path / "out", tokenizer=model,
        overrides=[*authors.HEADS, f"model.diffusion.path={frozen}"],
    )  # fmt: skip
    run = import_fairseq(job).checkpoint.parent
    config = load_config(run / "iter_0000000" / CONFIG_FILE, [])
    with single_process(config) as context:
        condition, null = TrainedModel(run, context).conditions([["a red circle"], ["dog"]])
    shape = (golden["sizes"]["cond_tokens"], golden["sizes"]["al_dim"])
    assert condition.shape == (2, *shape) and null.shape == (1, *shape)
    assert condition.isfinite().all() and not torch.equal(condition[0], condition[1])


def _tokenizer_of(folder: Path, vocab_size: int) -> Path:
    """A SentencePiece model with as many pieces as the golden vocabulary has room for."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(write_tokenizer(folder).read_bytes())
    expected = vocab_size - 7
    while len(proto.pieces) < expected:
        proto.pieces.add(piece=f"extra{len(proto.pieces)}", score=-1000.0)
    del proto.pieces[expected:]
    path = folder / "golden.model"
    path.write_bytes(proto.SerializeToString())
    return path
