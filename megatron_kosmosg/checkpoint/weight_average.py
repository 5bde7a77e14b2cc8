"""The exponential moving average of the weights that train: kept, saved and taken back.

Each rank averages the float32 weights that its optimizer updates: with the distributed optimizer a
share of them, so that the average is shared out alike. In a checkpoint it has an entry of its own
for every weight, split as the weight is, so that any layout takes it back: of the optimizer's
states Megatron-Core stores those of Adam and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_kosmosg.checkpoint.optimizer_state import updating_parts

AVERAGE = "ema"
"""Of the state of a checkpoint; with a dot, what the averages' keys begin with."""


class WeightAverage:
    """Keeps average <- d * average + (1 - d) * weights, taken after each update.

    d is `decay`, or (1 + n) / (10 + n) at the n-th update while that is less, so that the weights
    that the average started from are soon forgotten.
    """

    def __init__(
        self,
        decay: float,
        modules: Sequence[torch.nn.Module],
        optimizer: ChainedOptimizer,
        group: dist.ProcessGroup,
    ) -> None:
        """Starts from the weights as they are.

        Args:
            modules: this rank's share of the model.
            group: the replicas of that share, which may divide the optimizer's state among them.
        """
        self._decay, self._group, self._updates = decay, group, 0
        self._is_shared_out = any(
            isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers
        )
        found = list(_updated_here(modules, optimizer))
        self._weights = [weight for _, weight, _ in found]
        self._averages = [weight.detach().float().clone() for weight in self._weights]
        self._shares = {
            parameter: (average, share)
            for (parameter, _, share), average in zip(found, self._averages, strict=True)
        }

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights into the average; called after each update. Nothing waits for the
        device."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        if self._averages:  # a rank may hold frozen parts alone
            torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the weights as they are now."""
        self._updates = 0
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def state(self, models: dict[str, ShardedStateDict], *, is_loading: bool) -> dict[str, Any]:
        """What a checkpoint holds of the averages; a collective over the ranks of `group`.

        Args:
            models: the state of this rank's model (`weights.model_state`), whose keys and splits
                they take.
            is_loading: with room for the averages instead of them.
        """
        return {
            "updates": self._updates,
            "weights": {
                name: make_sharded_optimizer_tensor(
                    entry,
                    torch.empty(parameter.shape) if is_loading else self._whole(parameter),
                    AVERAGE,
                )
                for name, entry, parameter in _trained(models)
            },
        }

    @torch.no_grad()
    def load(self, models: dict[str, ShardedStateDict], state: dict[str, Any]) -> None:
        """Takes back what was read into `state(models, is_loading=True)`."""
        self._updates = state["updates"]
        for name, _, parameter in _trained(models):
            if parameter in self._shares:
                average, share = self._shares[parameter]
                average.view(-1).copy_(state["weights"][name].view(-1)[share])

    def _whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The average of a whole parameter of this rank, as it is shaped, on the host."""
        if not self._is_shared_out:
            return self._shares[parameter][0]
        whole = torch.zeros(parameter.shape, device=parameter.device)
        if parameter in self._shares:
            average, share = self._shares[parameter]
            whole.view(-1)[share] = average
        dist.all_reduce(whole, group=self._group)  # every value is one rank's, and zero on others
        return whole.cpu()


def _updated_here(
    modules: Sequence[torch.nn.Module], optimizer: ChainedOptimizer
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, slice]]:
    """Yields, for each parameter that this rank updates, (parameter, its float32 copy in the
    optimizer, the slice of the flattened parameter that this copy is)."""
    parts = updating_parts(optimizer)
    shared_out = [part for part in parts if isinstance(part, DistributedOptimizer)]
    for part in shared_out:
        for parameter, (group, order) in part.model_param_group_index_map.items():
            place = part._get_model_param_range_map(parameter)["param"]
            weight = part.optimizer.param_groups[group]["params"][order]
            yield parameter, weight, slice(place.start, place.end)
    if not shared_out:
        for module in modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    weight = getattr(parameter, "main_param", None)  # of a 16-bit parameter
                    yield parameter, parameter if weight is None else weight, slice(None)


def _trained(
    models: dict[str, ShardedStateDict],
) -> Iterator[tuple[str, ShardedTensor, torch.nn.Parameter]]:
    for part, entries in models.items():
        for name, entry in entries.items():
            parameter = entry.data
            if isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad:
                yield f"{part}.{name}", entry, parameter
