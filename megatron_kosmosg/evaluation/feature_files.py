"""Features of images and texts in files, a shard each, made once by any number of processes.

A shard's file carries a digest of all that its features depend on. One that is there and says the
same is kept, so a run that was killed goes on, and what changed meanwhile is scored anew. Batches
are shards, whoever computes them: the bytes do not depend on the number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_kosmosg import __version__
from megatron_kosmosg.config.errors import InputError
from megatron_kosmosg.evaluation.networks import (
    ClipNetwork,
    ImageNetwork,
    Weights,
    open_network,
)
from megatron_kosmosg.evaluation.preprocessing import PixelRule, read_rgb
from megatron_kosmosg.files import replacing
from megatron_kosmosg.launcher import RankInfo
from megatron_kosmosg.progress import ProgressCallback

SHARD_ITEMS = 32
"""Images that are scored in one batch."""
KEPT_SHARDS = 64
"""Of what images are compared with; all 30 subjects of DreamBench with all real images are 5."""


@dataclass(frozen=True)
class ImageGroup:
    """Images that the same networks see in the same way."""

    name: str
    paths: tuple[Path, ...]
    rules: Mapping[str, PixelRule]
    """{network: what it sees of an image}."""


@dataclass(frozen=True)
class TextGroup:
    """Texts whose features CLIP computes."""

    name: str
    texts: tuple[str, ...]


Group = ImageGroup | TextGroup


@dataclass(frozen=True)
class _Shard:
    group: Group
    number: int
    """Within the group."""

    @property
    def span(self) -> slice:
        return slice(self.number * SHARD_ITEMS, (self.number + 1) * SHARD_ITEMS)


class FeatureFiles:
    """The features of some groups, in a folder that is made with its first file."""

    def __init__(
        self, folder: Path, groups: Sequence[Group], weights: Mapping[str, Weights]
    ) -> None:
        """Cuts the groups into shards, which `extract` computes and writes to `folder`.

        Args:
            weights: of every network that a group names, and of `clip` for texts.
        """
        self._folder, self._weights = folder, weights
        self._groups = {group.name: group for group in groups}
        self._shards = [_Shard(group, i) for group in groups for i in range(_num_shards(group))]

    def extract(
        self, rank_info: RankInfo, device: torch.device, threads: int, progress: ProgressCallback
    ) -> None:
        """Makes what is missing of this rank's share. Raises InputError that names a file which is
        no image, and ConfigError for weights of another network."""
        local = [self._shards[i] for i in rank_info.share(len(self._shards))]
        missing = [shard for shard in local if not self._is_done(shard)]
        total, left = sum(map(_length, local)), sum(map(_length, missing))
        done = total - left
        progress(done, total)
        if not missing:
            return
        names = {name for shard in missing for name in _networks_of(shard.group)}
        networks = {name: open_network(self._weights[name], device) for name in sorted(names)}
        with ThreadPoolExecutor(threads) as readers:
            waiting: list[list[Future[dict[str, torch.Tensor]]]] = []
            try:
                # One shard is read while another is computed, and no more: memory stays flat.
                for i, shard in enumerate(missing):
                    while len(waiting) <= 1 and i + len(waiting) < len(missing):
                        waiting.append(self._begin(missing[i + len(waiting)], readers))
                    digest = self._digest(shard)
                    seen = [reading.result() for reading in waiting.pop(0)]
                    self._write(shard, digest, _computed(shard, seen, networks))
                    done += _length(shard)
                    progress(done, total)
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                raise

    def is_complete(self) -> bool:
        """Whether the features of all ranks are there."""
        return all(self._is_done(shard) for shard in self._shards)

    def blocks(self, group: str, network: str) -> Iterator[torch.Tensor]:
        """The features of the group's items in order, shard by shard: float32 [n, d] each."""
        for i in range(_num_shards(self._groups[group])):
            yield self._block(_Shard(self._groups[group], i), network)

    def rows(self, group: str, network: str) -> Callable[[Sequence[int]], torch.Tensor]:
        """A function that gives the features of any items of the group by their numbers, float32
        [n, d]. Only the shards used last stay in memory, which does not grow with the group."""

        @functools.lru_cache(KEPT_SHARDS)
        def block(number: int) -> torch.Tensor:
            return self._block(_Shard(self._groups[group], number), network)

        def rows(numbers: Sequence[int]) -> torch.Tensor:
            return torch.stack([block(i // SHARD_ITEMS)[i % SHARD_ITEMS] for i in numbers])

        return rows

    def _block(self, shard: _Shard, network: str) -> torch.Tensor:
        with safe_open(self._path(shard), "pt") as file:
            return file.get_tensor(network)

    def _begin(
        self, shard: _Shard, readers: ThreadPoolExecutor
    ) -> list[Future[dict[str, torch.Tensor]]]:
        if isinstance(shard.group, TextGroup):
            return []
        rules = shard.group.rules
        return [readers.submit(_seen, path, rules) for path in shard.group.paths[shard.span]]

    def _write(self, shard: _Shard, digest: str, features: dict[str, torch.Tensor]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(shard)) as temporary:
            save_file(features, temporary, {"digest": digest})

    def _path(self, shard: _Shard) -> Path:
        return self._folder / f"{shard.group.name}-{shard.number:06d}.safetensors"

    def _is_done(self, shard: _Shard) -> bool:
        try:
            with safe_open(self._path(shard), "pt") as file:
                found = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError):
            return False
        return found == self._digest(shard)

    def _digest(self, shard: _Shard) -> str:
        group = shard.group
        if isinstance(group, TextGroup):
            items: list[object] = list(group.texts[shard.span])
            rules = {"clip": "text"}
        else:
            items = [_state_of(path) for path in group.paths[shard.span]]
            rules = {name: rule.__name__ for name, rule in group.rules.items()}
        hashes = {name: self._weights[name].sha256 for name in rules}
        described = json.dumps([__version__, items, rules, hashes], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()


def _state_of(path: Path) -> list[object]:
    """A value that changes with the content of a file; the file is not read for it."""
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error.strerror}") from error
    return [str(path), found.st_size, found.st_mtime_ns]


def _seen(path: Path, rules: Mapping[str, PixelRule]) -> dict[str, torch.Tensor]:
    image = read_rgb(path)
    return {name: rule(image) for name, rule in rules.items()}


def _computed(
    shard: _Shard, seen: list[dict[str, torch.Tensor]], networks: Mapping[str, ImageNetwork]
) -> dict[str, torch.Tensor]:
    if isinstance(shard.group, TextGroup):
        clip = cast(ClipNetwork, networks["clip"])
        return {"clip": clip.text_features(shard.group.texts[shard.span]).contiguous()}
    return {
        name: networks[name].features(torch.stack([each[name] for each in seen])).contiguous()
        for name in shard.group.rules
    }


def _networks_of(group: Group) -> list[str]:
    return ["clip"] if isinstance(group, TextGroup) else list(group.rules)


def _size(group: Group) -> int:
    return len(group.texts if isinstance(group, TextGroup) else group.paths)


def _num_shards(group: Group) -> int:
    return -(-_size(group) // SHARD_ITEMS)


def _length(shard: _Shard) -> int:
    return min(SHARD_ITEMS, _size(shard.group) - shard.number * SHARD_ITEMS)
