"""Safetensors files of a component, in shards with an index, written and read piece by piece.

Names are those of transformers (stem `model`) and diffusers (stem `diffusion_pytorch_model`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.tensors import TensorInfo, TensorSource, in_files, num_bytes
from megatron_kosmosg.foreign_files import inside, read_json
from megatron_kosmosg.progress import ProgressCallback

_REWRITE = (
    "its pickles (.bin) are not read; where you trust them, add safetensors beside them once: "
    'python -c "from transformers import AutoModelForImageTextToText as M; '
    "M.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\""
)
MAX_SHARD_BYTES = 2_000_000_000
TRANSFORMERS, DIFFUSERS = "model", "diffusion_pytorch_model"
_DTYPE_OF = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFolder:
    """One component's weights as a TensorSource.

    Raises ConversionError for missing, truncated or contradictory files.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        files = _weight_files(folder, stem)
        self._file_of: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # not a dict, which one could iterate over
                    piece = file.get_slice(name)
                    dtype = _DTYPE_OF.get(piece.get_dtype())
                    if dtype is None:
                        raise ConversionError(f"{path}: {name} is of type {piece.get_dtype()}")
                    self._infos[name] = TensorInfo(tuple(piece.get_shape()), dtype)
                    self._file_of[name] = path

    def names(self) -> dict[str, TensorInfo]:
        return dict(self._infos)

    def read(self, name: str) -> torch.Tensor:
        with _opened(self._file_of[name]) as file:
            return file.get_tensor(name).clone()  # the file stays mapped no longer than this


def write_safetensors(
    folder: Path,
    stem: str,
    source: TensorSource,
    progress: ProgressCallback | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Writes the source's tensors in their order; holds one shard at a time. Says what it wrote.

    One shard is `stem.safetensors`; several come with `stem.safetensors.index.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    infos = source.names()
    shards = in_files(infos, max_shard_bytes)
    total, done = sum(map(num_bytes, infos.values())), 0
    report = progress or (lambda *_: None)
    report(done, total)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"{stem}{suffix}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = _owned(source.read(name))
            done += num_bytes(infos[name])
            report(done, total)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        _share(folder / file)
        del tensors
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in infos.values()})
    amount = f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.2f} MB"
    return (
        f"{len(infos)} tensors, {amount}, {', '.join(dtypes)}, "
        f"{len(shards)} {'file' if len(shards) == 1 else 'files'}"
    )


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of just its size: no view that keeps a larger one alive."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _share(path: Path) -> None:
    """Gives a file the usual permissions; safetensors leaves it readable by its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        if not single.is_file():
            pickles = any(folder.glob("*.bin"))
            raise ConversionError(
                f"{folder} has no {single.name} and no {index.name}"
                + (f"; {_REWRITE.format(folder=folder)}" if pickles else "")
            )
        return [single]
    try:
        names = read_json(index)["weight_map"].values()
        files = [inside(folder, name) for name in dict.fromkeys(names)]
        missing = [path.name for path in files if not path.is_file()]
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ConversionError(f"{index} is no index of shards: {error!r}") from None
    if missing:
        raise ConversionError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return files


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} is no whole safetensors file ({error}); copy or download it again"
        ) from None
