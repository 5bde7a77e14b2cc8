"""What the score draws for a sample comes with its batch: drawn by the threads that read it,
and not by the loss, between two kernels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_kosmosg.config.schema import FrozenFolder
from megatron_kosmosg.models.diffusion import FrozenDiffusion
from megatron_kosmosg.score.keyed_noise import NOISE, ScoreNoise, noise_of_batch
from megatron_kosmosg.score.stream import open_stream
from tests.support.data_helpers import build_dataset, run_config, write_tokenizer
from tests.support.tiny_models import TARGET_SIZE, replace_section, write_stable_diffusion

CPU = torch.device("cpu")
POSITIONS = (3, 0, 17)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Targets of the size of the tiny VAE."""
    folder = tmp_path_factory.mktemp("score_stream")
    write_tokenizer(folder)
    prefix = build_dataset(folder, "caption", 12)
    found = run_config(folder, "instruct", {"caption": (prefix, 1.0)})
    found = replace_section(found, "data", target_image_size=TARGET_SIZE)
    path = str(write_stable_diffusion(folder))
    return replace_section(found, "model", diffusion=FrozenFolder(path=path))


@pytest.fixture(scope="module")
def diffusion(config):
    path = config.model.diffusion.path
    return FrozenDiffusion.from_folder(path, device=CPU, dtype=torch.float32)


def batch_of(stream) -> dict[str, torch.Tensor]:
    samples = [stream[position] for position in POSITIONS]
    return stream.collate(samples, stream.pad_to(samples, POSITIONS))


@pytest.mark.parametrize("reads", ["all", "targets"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_batch_brings_the_noise_that_is_keyed_by_its_positions(config, diffusion, split, reads):
    batch = batch_of(open_stream(config, CPU, split, reads, True, diffusion))
    key = {"train": "instruct", "heldout": "instruct-heldout"}[split]
    positions = batch["stream_positions"]
    assert positions.tolist() == list(POSITIONS)
    shape = diffusion.latent_shape((TARGET_SIZE, TARGET_SIZE))
    drawn = ScoreNoise(config.score, config.training.seed)
    expected = drawn.noise(positions, key, shape, diffusion.num_timesteps)
    found = noise_of_batch(batch)
    assert found is not None and found.keys() == expected.keys() == set(NOISE)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    assert found["noise"].shape == (len(POSITIONS), *shape)
    assert not torch.equal(found["noise"], found["posterior_noise"])


def test_prompts_bring_which_conditions_are_dropped_and_no_noise_where_no_unet_is(config):
    often = dataclasses.replace(config.score, condition_drop_prob=0.5)
    config = dataclasses.replace(config, score=often)
    batch = batch_of(open_stream(config, CPU, "train", "prompts", True))
    drawn = ScoreNoise(config.score, config.training.seed)
    expected = drawn.condition_drop(batch["stream_positions"], "instruct")["condition_drop"]
    assert torch.equal(batch["condition_drop"], expected)
    assert noise_of_batch(batch) is None
    heldout = batch_of(open_stream(config, CPU, "heldout", "prompts", True))
    assert "condition_drop" not in heldout
