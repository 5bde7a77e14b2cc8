"""Where the frozen weights lie: mapped from their files, not read into the memory of every rank."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kosmosg import exit_codes
from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.models.read_frozen import reading_frozen
from megatron_kosmosg.monitoring.failure import exit_code_of
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


def load(folder: Path) -> FrozenDiffusion:
    return FrozenDiffusion.from_folder(folder, device=torch.device("cpu"), dtype=torch.float32)


def test_a_folder_of_the_half_precision_variant_alone_is_read(tmp_path):
    folder = write_stable_diffusion(tmp_path / "sd")
    whole = load(folder).unet.state_dict()
    for part in ("unet", "vae"):
        (weights,) = (folder / part).glob("*.safetensors")
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    renamed = load(folder).unet.state_dict()
    assert all(torch.equal(renamed[name], tensor) for name, tensor in whole.items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_shape(path: Path) -> None:
    """conv_out of the U-Net for one more channel."""
    weights = load_file(path)
    weights["conv_out.bias"] = torch.zeros(len(weights["conv_out.bias"]) + 1)
    save_file(weights, path)


@pytest.mark.parametrize("spoil", [cut, empty, other_shape], ids=lambda f: f.__name__)
def test_weights_that_cannot_be_read_are_an_error_of_the_input(tmp_path, spoil):
    folder = write_stable_diffusion(tmp_path / "sd")
    (weights,) = (folder / "unet").glob("*.safetensors")
    spoil(weights)
    with pytest.raises(ConfigError) as found:
        load(folder)
    assert str(found.value).startswith(f"model.diffusion.path={folder} cannot be read: ")
    assert exit_code_of(found.value) == exit_codes.BAD_INPUT


def test_a_file_server_that_does_not_answer_may_answer_the_next_start():
    for error in (OSError(errno.ESTALE, "stale"), torch.OutOfMemoryError("no memory")):
        with pytest.raises(type(error)) as found, reading_frozen("model.vision.path=x"):
            raise error
        assert found.value is error and exit_code_of(error) == exit_codes.FAILURE
