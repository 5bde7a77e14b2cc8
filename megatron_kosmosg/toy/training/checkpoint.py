"""Files of a training run of the toy assets: written under a temporary name, then renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_kosmosg.files import new_folder, replacing


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values) so that the file is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: Path) -> dict[str, Any] | None:
    """What `save` wrote, or None when there is no such file."""
    if not path.exists():
        return None
    return torch.load(path, weights_only=True, map_location="cpu")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `folder`, its files readable by all."""
    with new_folder(folder, only_writer=True, replaces=True) as temporary:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)


class Average:
    """Exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the module; early steps count for more."""
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        with torch.no_grad():
            for key, value in module.state_dict().items():
                if value.is_floating_point():
                    self.weights[key].lerp_(value, 1.0 - decay)
                else:
                    self.weights[key].copy_(value)
