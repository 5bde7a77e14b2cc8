"""Where the frozen weights lie: mapped from their files, not read into the memory of every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_kosmosg.models.diffusion import FrozenDiffusion
from tests.support.tiny_models import write_stable_diffusion

pytest.importorskip("accelerate", reason="diffusers maps weights only with accelerate")


def mapped_ranges(file: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that show `file`."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            first, _, last = line.split()[0].partition("-")
            ranges.append((int(first, 16), int(last, 16)))
    return ranges


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_unet_and_vae_are_mapped_from_their_files(tmp_path):
    folder = write_stable_diffusion(tmp_path)
    diffusion = FrozenDiffusion.from_folder(folder, device=torch.device("cpu"), dtype=torch.float32)
    for name, module in (("unet", diffusion.unet), ("vae", diffusion.vae)):
        file = folder / name / "diffusion_pytorch_model.safetensors"
        ranges = mapped_ranges(file)
        assert ranges, f"{file} is not mapped"
        # Convolutions of the U-Net are copied once: they change to channels-last.
        kept = {key: p for key, p in module.named_parameters() if p.ndim != 4 or name == "vae"}
        outside = [
            key
            for key, parameter in kept.items()
            if not any(first <= parameter.data_ptr() < last for first, last in ranges)
        ]
        assert kept and not outside, outside
