"""The authors' checkpoint container: a fairseq dict with `model` (weights) and `cfg` or `args`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_kosmosg.config.errors import ConversionError
from megatron_kosmosg.conversion.tensors import TensorInfo
from megatron_kosmosg.conversion.torch_file import LazyTensor, load_lazily


class LazyTensors:
    """Tensors of a `torch.save` file by name, as a TensorSource."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors

    def names(self) -> dict[str, TensorInfo]:
        return {name: tensor.info for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].read()


class FairseqFile(LazyTensors):
    """The weights of a fairseq checkpoint, and its options."""

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        """Raises ConversionError for a file that is no fairseq checkpoint."""
        content = load_lazily(path, trust=trust)
        model = content.get("model") if isinstance(content, Mapping) else None
        if not isinstance(model, Mapping) or not model:
            found = type(content).__name__
            if isinstance(content, Mapping):
                found = f"keys {sorted(map(str, content))[:8]}"
            raise ConversionError(
                f"{path} is no fairseq checkpoint: it needs a key 'model' with the weights, but "
                f"holds {found}"
            )
        odd = [str(name) for name, value in model.items() if not isinstance(value, LazyTensor)]
        if odd:
            raise ConversionError(f"{path}: model has entries that are no tensors: {odd[:5]}")
        super().__init__(model)
        self._options = [
            options
            for options in (_entry(content.get("cfg"), "model"), content.get("args"))
            if options is not None
        ]

    def option(self, name: str) -> Any:
        """A setting of the run that wrote the file; None where it does not say."""
        for options in self._options:
            value = _entry(options, name)
            if value is not None:
                return value
        return None


def _entry(options: Any, name: str) -> Any:
    """The entry `name` of options that are a dict, an argparse.Namespace or an OmegaConf node (as a
    placeholder)."""
    attributes = options if isinstance(options, Mapping) else getattr(options, "__dict__", {})
    if isinstance(attributes.get("_content"), Mapping):  # an OmegaConf mapping
        attributes = attributes["_content"]
    value = attributes.get(name)
    return getattr(value, "__dict__", {}).get("_val", value)  # an OmegaConf leaf
