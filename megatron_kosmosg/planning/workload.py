"""The samples a plan reckons with: length and images of each kind, and how micro-batches pad.

Lengths are those usual for each kind (data/kinds); the data itself is not opened, only its
manifests, for the kinds. Samples are dealt to micro-batches by
length as in training, so a micro-batch is as long as its longest row, and `instruct` adds the null
condition's row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_kosmosg.config.errors import ConfigError, InputError
from megatron_kosmosg.config.rank_grid import RankGrid
from megatron_kosmosg.config.schema import BlendEntry, RunConfig
from megatron_kosmosg.data.kinds import KINDS
from megatron_kosmosg.data.kinds.kind import UsualSize
from megatron_kosmosg.data.manifest import dataset_kind
from megatron_kosmosg.foreign_files import read_json
from megatron_kosmosg.models.stable_diffusion_sizes import SD_V1_5_VAE
from megatron_kosmosg.stages import stage_facts


@dataclass(frozen=True)
class MixtureEntry:
    """The size of an ordinary sample of one dataset."""

    dataset: str
    kind: str
    share: float
    """Of the global batch."""
    length: int
    """Decoder positions."""
    prompt_images: float
    """In the prompt."""


@dataclass(frozen=True)
class MicroBatch:
    """The sizes of what one forward pass works on."""

    images: int
    """Rows that count: target images, captions, packed rows."""
    rows: int
    """Rows of the decoder, null condition included."""
    length: int
    """Positions of each row, padding included."""
    prompt_images: float
    """For the image tower, over all rows."""

    @property
    def positions(self) -> int:
        """Positions of the decoder, padding included."""
        return self.rows * self.length


def latent_shape(config: RunConfig) -> tuple[int, int, int]:
    """The (channels, height, width) of a target's latents, by the VAE of the config's folder; by
    Stable Diffusion v1.5's where that is not on this machine."""
    file = Path(config.model.diffusion.path or "") / "vae" / "config.json"
    is_here = config.model.diffusion.path is not None and file.is_file()
    try:
        vae = read_json(file) if is_here else SD_V1_5_VAE
        side = config.data.target_image_size // 2 ** (len(vae["block_out_channels"]) - 1)
        return int(vae["latent_channels"]), side, side
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is no VAE's: {error!r}") from error


def with_kinds(config: RunConfig) -> RunConfig:
    """The config with the kind of every dataset of data.blend that its manifest or the config says.

    Raises ConfigError where the two differ, and for a manifest that cannot be read.
    """
    blend = {
        name: replace(entry, kind=dataset_kind(f"data.blend.{name}", entry))
        for name, entry in config.data.blend.items()
    }
    return replace(config, data=replace(config.data, blend=blend))


def mixture(config: RunConfig) -> list[MixtureEntry]:
    """The datasets of `config.data.blend`, longest samples first.

    Kinds are those in `config` (see `with_kinds`); a dataset without one, and an empty blend, count
    as the heaviest kind of the stage. Raises ConfigError for a kind that the stage does not read.
    """
    read = _kinds_read(config)
    blend = config.data.blend or {"": BlendEntry("")}
    total = sum(entry.weight for entry in blend.values())
    found = []
    for name, entry in blend.items():
        kind = entry.kind or _heaviest(read)
        if kind not in read:
            raise ConfigError(
                f"data.blend.{name} is of kind {kind}; {config.stage} reads {', '.join(read)}"
            )
        usual, share = read[kind], entry.weight / total
        found.append(MixtureEntry(name, kind, share, usual.length, usual.images))
    return sorted(found, key=lambda entry: -entry.length)


def assumed_kinds(config: RunConfig) -> list[str]:
    """A sentence for every dataset whose kind `mixture` had to assume."""
    heaviest = _heaviest(_kinds_read(config))
    sentences = [
        f"data.blend.{name}: its kind is unknown (no dataset at {entry.path} on this machine, no "
        f"data.blend.{name}.kind) and assumed to be {heaviest}, the heaviest that {config.stage} "
        "reads"
        for name, entry in config.data.blend.items()
        if entry.kind is None
    ]
    if not config.data.blend:
        sentences.append(f"data.blend is empty: samples are assumed to be of kind {heaviest}")
    return sentences


def _kinds_read(config: RunConfig) -> dict[str, UsualSize]:
    """A usual sample (in `pretrain`, a packed row) of each kind that the stage reads, by kind."""
    return {
        kind.name: use.usual_size(config.data.seq_length)
        for kind in KINDS.values()
        if (use := kind.use(config.stage)) is not None
    }


def _heaviest(read: dict[str, UsualSize]) -> str:
    return max(read, key=lambda kind: (read[kind].length, read[kind].images))


def micro_batches(config: RunConfig, count: int) -> list[MicroBatch]:
    """The `count` micro-batches of one replica in one update, longest first."""
    images = config.training.micro_batch_size
    entries = mixture(config)
    facts = stage_facts(config.stage)
    by_length = facts.deals_by_length and config.data.balance_tokens
    batches = []
    for index in range(count):
        span = (index / count, (index + 1) / count) if by_length else (0.0, 1.0)
        shares = _shares(entries, *span)
        length = max(entry.length for entry, share in zip(entries, shares, strict=True) if share)
        prompt_images = sum(
            e.prompt_images * s for e, s in zip(entries, shares, strict=True)
        ) / sum(shares)
        rows = images + facts.has_null_row
        batches.append(MicroBatch(images, rows, length, images * prompt_images))
    return batches


def _shares(entries: list[MixtureEntry], start: float, stop: float) -> list[float]:
    """The share of each dataset between two quantiles of the samples sorted by length."""
    shares, position = [], 0.0
    for entry in entries:
        overlap = min(stop, position + entry.share) - max(start, position)
        shares.append(overlap if overlap > 1e-9 else 0.0)
        position += entry.share
    return shares


@dataclass(frozen=True)
class ScoreShare:
    """The share of a micro-batch that a dedicated score rank gets."""

    images: int
    """At once."""
    groups: int
    """Score ranks, or sets of them, that work on different micro-batches."""
    used: float
    """Share of the unit's score ranks' time that its images take, were all ranks to work."""


def score_share(config: RunConfig, world: RankGrid, num_microbatches: int) -> ScoreShare:
    """Whole micro-batches in turn; all ranks share the rows of one where there are fewer."""
    images, ranks = config.training.micro_batch_size, world.score_ranks_per_unit
    if num_microbatches >= ranks:
        return ScoreShare(images, max(ranks, 1), 1.0)
    largest = -(-images // ranks)
    return ScoreShare(largest, 1, images / (largest * ranks))
