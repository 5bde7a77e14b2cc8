"""What the score draws for a sample, keyed by its stream position: any layout and any resume draws
the same. Streams draw it in the threads that read; what was not drawn there is drawn by the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_kosmosg.config.schema import ScoreConfig
from megatron_kosmosg.data.random_keys import torch_generator

KeyedNoise = dict[str, torch.Tensor]
"""By name, with one row a sample, as a batch has them."""
CONDITION_DROP = "condition_drop"
NOISE = ("timesteps", "posterior_noise", "noise")


@dataclass(frozen=True)
class RandomKey:
    """The part of the key of random draws that is the same in a whole run: every draw also takes a
    stream position and a tag."""

    seed: int
    stream: str
    """Name of the sample stream, e.g. `instruct` or `instruct-heldout`."""

    def uniform(self, positions: torch.Tensor, tag: str) -> torch.Tensor:
        """One float32 number in [0, 1) per stream position; CPU tensor [b]."""
        return torch.stack(
            [torch.rand((), generator=self._generator(p, tag)) for p in positions.tolist()]
        )

    def normal(self, positions: torch.Tensor, tag: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal noise [b, *shape], float32 on the CPU, one generator per position."""
        rows = [torch.randn(shape, generator=self._generator(p, tag)) for p in positions.tolist()]
        return torch.stack(rows) if rows else torch.empty(0, *shape)

    def _generator(self, position: int, tag: str) -> torch.Generator:
        return torch_generator(self.seed, self.stream, position, tag)


def noise_of_batch(batch: dict[str, torch.Tensor]) -> KeyedNoise | None:
    """The noise that a batch brings with it; None where it has none."""
    return {name: batch[name] for name in NOISE} if NOISE[0] in batch else None


@dataclass(frozen=True)
class ScoreNoise:
    """The random draws of the score in one run."""

    config: ScoreConfig
    seed: int

    def condition_drop(self, positions: torch.Tensor, stream: str) -> KeyedNoise:
        """{"condition_drop": bool [b]} on the CPU, True where the sample trains on the null
        condition."""
        chance = RandomKey(self.seed, stream).uniform(positions, CONDITION_DROP)
        return {CONDITION_DROP: chance < self.config.condition_drop_prob}

    def noise(
        self,
        positions: torch.Tensor,
        stream: str,
        shape: tuple[int, ...],
        num_timesteps: int,
    ) -> KeyedNoise:
        """{"timesteps": int64 [b], "posterior_noise" and "noise": float32 [b, *shape]} on the CPU.

        Args:
            shape: of an image's latents.
            num_timesteps: of the noise schedule.
        """
        key = RandomKey(self.seed, stream)
        return {
            "timesteps": self.timesteps(key.uniform(positions, "timestep"), num_timesteps),
            "posterior_noise": key.normal(positions, "posterior", shape),
            "noise": key.normal(positions, "noise", shape),
        }

    def timesteps(self, uniform: torch.Tensor, num_timesteps: int) -> torch.Tensor:
        """Timesteps int64 [b] by `score.timestep_sampling`, from uniform numbers [b] in [0, 1)."""
        if self.config.timestep_sampling == "power":
            uniform = uniform**self.config.timestep_power
        return (uniform * num_timesteps).long().clamp(max=num_timesteps - 1)
