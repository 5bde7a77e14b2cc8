"""Peak memory and time of export-hf and import-hf at the released sizes, with random weights.

Writes a checkpoint, a tokenizer and a Stable Diffusion of full size, exports, imports the export
and compares bit for bit. Each step is a process of its own. Its peak is its resident memory, of
which about 0.6 GB are the imported libraries (the step `nothing` shows how much):

    python benchmarks/export_memory.py --folder /tmp/export --dtype fp16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from conversion_memory import measure
from diffusers import AutoencoderKL, UNet2DConditionModel
from sentencepiece import sentencepiece_model_pb2

from megatron_kosmosg.config.schema import DataConfig, LoggingConfig, RunConfig
from megatron_kosmosg.conversion.checkpoint_reader import CheckpointTensors
from megatron_kosmosg.conversion.checkpoint_writer import model_tensors, write_checkpoint
from megatron_kosmosg.conversion.export_hf import export_hf
from megatron_kosmosg.conversion.import_hf import import_hf
from megatron_kosmosg.conversion.safetensors_files import DIFFUSERS, write_safetensors
from megatron_kosmosg.conversion.tensors import TensorInfo
from megatron_kosmosg.parallel.platform import DTYPES
from megatron_kosmosg.toy import assets

UNET = {"sample_size": 64, "cross_attention_dim": 768}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 512,
}
"""Stable Diffusion 1.5, where diffusers' defaults are not it already."""


class Random:
    """A source of random tensors, made when they are read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._infos = {name: TensorInfo(tuple(shape), dtype) for name, shape in shapes.items()}

    def names(self) -> dict[str, TensorInfo]:
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        shape, dtype = self._infos[name]
        numbers = torch.empty(shape, dtype=dtype)
        # Any bytes whose highest exponent bit is off are small finite numbers; quick to draw.
        numbers.view(torch.uint8).random_(0, 60)
        return numbers


def write_tokenizer(path: Path) -> None:
    """The toy's SentencePiece model with made-up pieces up to the released model's 64,000."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((assets.path() / "sentencepiece.model").read_bytes())
    while len(model.pieces) < 64000:
        model.pieces.add(piece=f"\u2581made-up-{len(model.pieces)}", score=-20.0)
    path.write_bytes(model.SerializeToString())


def write_stable_diffusion(folder: Path, dtype: torch.dtype) -> None:
    """U-Net, VAE and scheduler of full size."""
    parts = {"unet": (UNet2DConditionModel, UNET), "vae": (AutoencoderKL, VAE)}
    for name, (kind, settings) in parts.items():
        with torch.device("meta"):
            model = kind(**settings)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        write_safetensors(folder / name, DIFFUSERS, Random(shapes, dtype))
        model.save_config(folder / name)
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "DDPMScheduler"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def make(folder: Path, dtype: torch.dtype) -> None:
    """The inputs."""
    folder.mkdir(parents=True)
    write_tokenizer(folder / "spm.model")
    config = RunConfig(
        stage="instruct",
        data=DataConfig(tokenizer_model=str(folder / "spm.model")),
        logging=LoggingConfig(output_dir=str(folder / "run")),
    )
    write_checkpoint(folder / "run", config, Random(model_tensors(config), dtype))
    write_stable_diffusion(folder / "sd", dtype)


def compare(folder: Path, dtype: torch.dtype) -> None:
    """Every tensor that came back is the one that was exported."""
    before, after = CheckpointTensors(folder / "run"), CheckpointTensors(folder / "back")
    assert before.names() == after.names()
    for name in before.names():
        assert torch.equal(before.read(name), after.read(name)), name


STEPS: dict[str, tuple[Callable[[Path, torch.dtype], object], str | None]] = {
    "nothing": (lambda folder, dtype: None, None),
    "make": (make, None),
    "export-hf": (lambda f, dtype: export_hf(f / "run", f / "sd", f / "hf", dtype), "hf"),
    "import-hf": (lambda f, dtype: import_hf(f / "hf", f / "back"), "back"),
    "compare": (compare, None),
}
"""{step: (what it does, the folder that it writes)}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="new folder, 16 GB at fp16")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        torch.set_num_threads(1)
        STEPS[args.step][0](args.folder, DTYPES[args.dtype])
        return
    for step, (_, written) in STEPS.items():
        used = measure([sys.executable, __file__, *sys.argv[1:], "--step", step])
        files = [] if written is None else (args.folder / written).rglob("*")
        size = sum(path.stat().st_size for path in files if path.is_file())
        print(
            f"{step:10} {used.seconds:6.0f} s, writes {size / 1e9:5.2f} GB, "
            f"peak {used.peak_bytes / 1e9:5.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
