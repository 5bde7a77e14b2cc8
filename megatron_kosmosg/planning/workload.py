"""The samples a plan reckons with: length and pictures of each kind, and how micro-batches pad.

Lengths are those of ordinary prompts (64 positions a picture, two marks, a sentence); the data
itself is not opened. Samples are dealt to micro-batches by length as in training, so a micro-batch
is as long as its longest row, and `instruct` adds the null condition's row.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kosmosg.config.schema import RunConfig


@dataclass(frozen=True)
class Kind:
    """An ordinary sample of one dataset."""

    share: float
    """Of the global batch."""
    length: int
    """Decoder positions."""
    pictures: float
    """In the prompt."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass works on."""

    images: int
    """Rows that count: target images, captions, packed rows."""
    rows: int
    """Rows of the decoder, null condition included."""
    length: int
    """Positions of each row, padding included."""
    pictures: float
    """For the image tower, over all rows."""

    @property
    def positions(self) -> int:
        """Decoder positions, padding included."""
        return self.rows * self.length


_ORDINARY = {
    "instruct": {"compositional": (215, 2.0), "edit": (100, 1.0), "caption": (40, 0.0)},
    "align": {"caption": (40, 0.0)},
}
_PACKED_PICTURES = {"text": 0.0, "caption": 20.0, "interleaved": 8.0}
"""Pictures in a packed row of 2,048 positions: about 100 positions a captioned picture."""


def kinds(config: RunConfig) -> list[Kind]:
    """The mixture of `config.data.blend`, longest first.

    A dataset whose name is no known kind counts as the stage's longest.
    """
    blend = {name: entry.weight for name, entry in config.data.blend.items()} or {"": 1.0}
    total = sum(blend.values())
    found = []
    for name, weight in blend.items():
        if config.stage == "pretrain":
            pictures = _PACKED_PICTURES.get(name, 0.0) * config.data.seq_length / 2048
            found.append(Kind(weight / total, config.data.seq_length, pictures))
        else:
            ordinary = _ORDINARY[config.stage]
            length, pictures = ordinary.get(name, max(ordinary.values()))
            found.append(Kind(weight / total, min(length, config.data.seq_length), pictures))
    return sorted(found, key=lambda kind: -kind.length)


def micro_batches(config: RunConfig, count: int) -> list[MicroBatch]:
    """The `count` micro-batches of one replica in one update, longest first."""
    images = config.training.micro_batch_size
    mixture = kinds(config)
    by_length = config.stage == "instruct" and config.data.balance_tokens
    batches = []
    for index in range(count):
        span = (index / count, (index + 1) / count) if by_length else (0.0, 1.0)
        shares = _shares(mixture, *span)
        length = max(kind.length for kind, share in zip(mixture, shares, strict=True) if share)
        pictures = sum(k.pictures * s for k, s in zip(mixture, shares, strict=True)) / sum(shares)
        rows = images + (config.stage == "instruct")
        batches.append(MicroBatch(images, rows, length, images * pictures))
    return batches


def _shares(mixture: list[Kind], start: float, stop: float) -> list[float]:
    """How much of each kind lies between two quantiles of the samples sorted by length."""
    shares, position = [], 0.0
    for kind in mixture:
        overlap = min(stop, position + kind.share) - max(start, position)
        shares.append(overlap if overlap > 1e-9 else 0.0)
        position += kind.share
    return shares
