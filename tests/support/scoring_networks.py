"""The Inception network that scores images, as a file of random weights with the published names.

Those of DINO and CLIP are `megatron_kosmosg/toy/stand_in_networks.py`'s.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from megatron_kosmosg.evaluation.inception import FidInception


def write_inception(path: Path, seed: int = 2) -> Path:
    """A file of the published size, whose activations neither die nor grow."""
    torch.manual_seed(seed)
    model = FidInception()
    for values in model.parameters():
        if values.dim() > 1:
            nn.init.normal_(values, std=(2 / values[0].numel()) ** 0.5)
    torch.save(model.state_dict(), path)
    return path
