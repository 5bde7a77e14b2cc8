"""How many score ranks of other jobs a layout needs, and what it is with and without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.config.rank_grid import has_score_ranks, rank_grid
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.planning.estimate import Estimate, estimate
from megatron_kosmosg.planning.gpus import Efficiency, Gpu
from megatron_kosmosg.planning.joined import JoinedRanks
from megatron_kosmosg.planning.model_counts import ModelShares
from megatron_kosmosg.stages import stage_facts

_ENOUGH = 0.99
"""Share of the speed with any number of score ranks."""


@dataclass(frozen=True)
class Enough:
    """The fewest score ranks of one kind of GPU with which no decoder rank waits for a free one."""

    gpu: str
    count: int
    images_per_second: float
    decoder_idle: float
    """What is left: the answers' own time, pipeline, exchange of gradients, optimizer."""


@dataclass(frozen=True)
class FleetPlan:
    """A layout with those that joined, and without."""

    estimate: Estimate
    images: int
    """An update."""
    images_per_second_without: float
    enough: list[Enough]
    """For each kind of GPU, were they the only ones that join."""

    def as_dict(self) -> dict:
        """For the JSON."""
        seconds = self.estimate.seconds
        return {
            "joined": [
                {
                    "gpu": one.joined.gpu.name,
                    "count": one.joined.count,
                    "seconds_a_request": one.seconds,
                    "share_of_requests": one.answered,
                    "idle": one.idle,
                    "network_mb_s": one.bytes_a_rank / seconds / 1e6,
                    "memory_gib": one.memory_gib,
                    "fits": one.fits,
                    "enough": enough.count,
                    "images_per_second_with_enough": enough.images_per_second,
                    "decoder_idle_with_enough": enough.decoder_idle,
                }
                for one, enough in zip(self.estimate.joined, self.enough, strict=True)
            ],
            "images_per_second_without": self.images_per_second_without,
            "network_mb_s_a_replica": self._network_mb_s(),
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = []
        for one, enough in zip(self.estimate.joined, self.enough, strict=True):
            gpu, rank = one.joined.gpu, one.bytes_a_rank / self.estimate.seconds / 1e6
            lines.append(
                f"joined: {one.joined.count} x {gpu.name} answer {one.answered:.0%} of the "
                f"requests in {one.seconds * 1e3:.0f} ms each, idle {one.idle:.1%}, "
                f"{rank:.1f} MB/s a rank; {one.memory_gib:.1f} GiB of {gpu.memory_gib:g}: "
                + ("fits" if one.fits else "DOES NOT FIT")
            )
            speed = f"{enough.images_per_second:,.0f} samples/s, decoder idle"
            lines.append(
                f"  {enough.count} x {gpu.name} are enough: no decoder rank waits for a free one "
                f"({speed} {enough.decoder_idle:.1%})"
            )
        lines.append(
            f"without them {self.images_per_second_without:,.0f} samples/s; over the network "
            f"{self._network_mb_s():.1f} MB/s a replica; planned as if replicas knew who is free "
            "(docs/score_ranks.md: what they reach of it)"
        )
        return lines

    def _network_mb_s(self) -> float:
        """What a replica exchanges with those that joined."""
        moved = sum(one.bytes_a_rank * one.joined.count for one in self.estimate.joined)
        return moved / self.estimate.world.num_replicas / self.estimate.seconds / 1e6


def check_joined(config: RunConfig, joined: Sequence[JoinedRanks], *, searches: bool) -> None:
    """Raises ConfigError where they could not join: there is no U-Net, it has no ranks of its own
    and no search gives it some, or a GPU lacks the run's precision."""
    if not joined:
        return
    if not stage_facts(config.stage).has_unet:
        raise ConfigError(f"--score-ranks: stage={config.stage} has no U-Net; only instruct has")
    if not searches and not has_score_ranks(config):
        raise ConfigError(
            f"--score-ranks: with score.placement={config.score.placement} none can join; set "
            "score.placement=dedicated, or add --search"
        )
    for one in joined:
        one.gpu.peak_flops(config.training.precision)


def fleet_plan(
    config: RunConfig,
    gpu: Gpu,
    efficiency: Efficiency,
    shares: ModelShares,
    planned: Estimate,
) -> FleetPlan:
    """planned: the estimate of `config` with those that joined."""
    images = config.training.global_batch_size
    world = rank_grid(config, planned.world.world_size)

    def with_ranks(*joined: JoinedRanks) -> Estimate:
        return estimate(config, world, gpu, efficiency, shares, joined)

    # As many as there can be requests: more would not be asked.
    most = images
    enough = []
    for one in planned.joined:
        card = one.joined.gpu

        def seconds(count: int, card: Gpu = card) -> float:
            joined = [JoinedRanks(count, card)] if count else []
            return with_ranks(*joined).seconds

        count = _fewest(seconds, most)
        found = with_ranks(*([JoinedRanks(count, card)] if count else []))
        enough.append(Enough(card.name, count, images / found.seconds, found.decoder_idle))
    return FleetPlan(planned, images, images / with_ranks().seconds, enough)


def _fewest(seconds: Callable[[int], float], most: int) -> int:
    """The smallest count with which an update takes hardly longer than with `most`; 0 is one."""
    target = seconds(most) / _ENOUGH
    if seconds(0) <= target:
        return 0
    low, high = 0, 1
    while high < most and seconds(high) > target:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(middle) <= target else (middle, high)
    return high
