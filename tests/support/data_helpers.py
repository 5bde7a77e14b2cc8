"""Small inputs for the data tests: a SentencePiece model, images, JSONL files, datasets."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from megatron_kosmosg.config.schema import (
    AlignerConfig,
    BlendEntry,
    DataConfig,
    FrozenFolder,
    LoggingConfig,
    ModelConfig,
    ResamplerConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.preprocess.preprocess_run import PreprocessJob, preprocess

REPOSITORY = Path(__file__).parents[2]

WORDS = (
    "a the red green blue circle square triangle with stripes dots and on yellow background in "
    "snow make it bigger now garden dog house ran over small hill then stopped"
).split()


@lru_cache(maxsize=1)
def spm_model_bytes() -> bytes:
    """A word-level SentencePiece model with the sentence marks as pieces of their own."""
    out = io.BytesIO()
    text = [" ".join(WORDS[i:] + WORDS[:i]) + ' . ! ? " )' for i in range(len(WORDS))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=out,
        vocab_size=90,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def write_tokenizer(folder: Path) -> Path:
    """The model file in `folder`."""
    path = folder / "spm.model"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(spm_model_bytes())
    return path


def encode_image(
    image: np.ndarray | Image.Image, image_format: str = "PNG", **options: Any
) -> bytes:
    """An image, or uint8 HWC or HW, encoded; options are those of Pillow's writer."""
    out = io.BytesIO()
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    opened.save(out, image_format, **options)
    return out.getvalue()


def noise_image(seed: int, height: int = 12, width: int = 12, image_format: str = "PNG") -> bytes:
    """A smooth random image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return encode_image(np.asarray(image), image_format)


def sentence(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, num_words)) + " ."


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def text_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "text": " ".join(
                sentence(rng, int(rng.integers(2, 9))) for _ in range(rng.integers(1, 6))
            )
        }
        for _ in range(count)
    ]


def image_records(folder: Path, kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of one of the kinds with images, which are written into `folder`/images."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)

    def image(name: str) -> str:
        path = folder / "images" / f"{kind}-{name}.png"
        path.write_bytes(noise_image(int(rng.integers(1 << 30))))
        return f"images/{path.name}"

    def mask(name: str) -> str:
        path = folder / "images" / f"{kind}-{name}-mask.png"
        pixels = np.zeros((12, 12), np.uint8)
        pixels[2:9, 3:10] = 255
        path.write_bytes(encode_image(pixels))
        return f"images/{path.name}"

    records = []
    for i in range(count):
        key = f"{kind}-{i}"
        if kind == "caption":
            caption = sentence(rng, int(rng.integers(2, 7)))
            record = {"image": image(str(i)), "caption": caption, "topic": i}
        elif kind == "interleaved":
            content: list[dict[str, str]] = []
            for j in range(rng.integers(1, 4)):
                content.append({"image": image(f"{i}-{j}")})
                content.append({"text": sentence(rng, int(rng.integers(2, 7)))})
            record = {"content": content}
        elif kind == "edit":
            record = {
                "caption": sentence(rng, 4),
                "image": image(f"{i}-a"),
                "instruction": sentence(rng, 3),
                "target": image(f"{i}-b"),
            }
        else:
            caption = "a red circle and a blue square on a green background"
            entities = [
                {"text": text, "span": [at, at + len(text)], "image": image(f"{i}-{text}")}
                for text in ("red circle", "blue square")
                for at in [caption.index(text)]
            ]
            entities[0]["mask"] = mask(f"{i}")
            entities[1]["mask"] = None
            record = {"caption": caption, "image": image(f"{i}-t"), "entities": entities}
        records.append({"key": key} | record)
    return records


def build_dataset(folder: Path, kind: str, count: int, seed: int = 0, name: str = "") -> str:
    """Prefix of a preprocessed dataset."""
    source = folder / f"source-{kind}{name}"
    records = text_records(count, seed)
    if kind != "text":
        records = image_records(source, kind, count, seed)
    path = write_jsonl(source / "records.jsonl", records)
    prefix = str(folder / f"{kind}{name}")
    model = str(write_tokenizer(folder))
    preprocess(PreprocessJob(kind, (str(path),), model, prefix), lambda *_: None)
    return prefix


def break_image(folder: Path, kind: str, name: str, which: int, part: int) -> str:
    """A copy of a dataset in which one image's bytes are overwritten; returns its prefix."""
    prefix = build_dataset(folder, kind, 8, name=name)
    overwrite_image(prefix, which, part)
    return prefix


def overwrite_image(prefix: str | Path, which: int, part: int) -> None:
    """Zeros in place of image `part` of sample `which`."""
    shard, number = SampleStore(prefix).shards.locate(which)
    data = shard.sequences
    images = [i for i in data.document(number) if data[i][1] == 1]
    start, length = data.index.pointers[images[part]], data.index.lengths[images[part]]
    with Path(f"{shard.prefix}.bin").open("r+b") as file:
        file.seek(int(start))
        file.write(b"\0" * int(length))


def write_clip_tokenizer(folder: Path) -> Path:
    """A tiny CLIPTokenizer under `folder`/tokenizer; returns `folder`."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [".", "!"]
    vocab = letters + [letter + "</w>" for letter in letters]
    merges = [("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>")]
    vocab += ["th", "the</w>", "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    target = folder / "tokenizer"
    target.mkdir(parents=True, exist_ok=True)
    (target / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (target / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    CLIPTokenizer(
        str(target / "vocab.json"), str(target / "merges.txt"), **special
    ).save_pretrained(target)
    return folder


def run_config(
    folder: Path, stage: str, blend: dict[str, tuple[str, float]], **data: Any
) -> RunConfig:
    """A small RunConfig over the datasets in `blend`: name -> (prefix, weight)."""
    model_path = write_tokenizer(folder)
    entries = {name: BlendEntry(path, weight) for name, (path, weight) in blend.items()}
    settings = {"seq_length": 60, "target_image_size": 16, "image_backend": "pillow"} | data
    return RunConfig(
        stage=stage,  # type: ignore[arg-type]  # str: tests name stages freely
        model=ModelConfig(
            vocab_size=Tokenizer(model_path).vocab_size,
            vision=VisionConfig(image_size=8),
            resampler=ResamplerConfig(num_latent_queries=4),
            aligner=AlignerConfig(num_queries=30),
            clip_text=FrozenFolder(str(folder)),
        ),
        data=DataConfig(
            tokenizer_model=str(model_path), blend=entries, heldout=entries, **settings
        ),
        training=TrainingConfig(seed=7),
        logging=LoggingConfig(output_dir=str(folder / "run")),
    )


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def main_of(script: str, arguments: list[str], monkeypatch) -> int:
    spec = importlib.util.spec_from_file_location("tool", REPOSITORY / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    return module.main()
