"""What flows through the data package: prompts, packed rows, and the protocol of a stream.

Letters: s sequence, b micro-batch, n images. Masks say their polarity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

if TYPE_CHECKING:  # kinds of samples, which plans and help texts read, need neither
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class EntityImage:
    """A prompt image of one entity, encoded; with a mask, its background is painted white."""

    image: bytes
    mask: bytes | None = None
    """Encoded one-channel image of the same size, 255 = entity; None keeps the background."""


@dataclass(frozen=True)
class Prompt:
    """One model input, not yet decoded. Starts with <s>; never ends with </s>."""

    tokens: np.ndarray
    """int64 [s]."""
    image_mask: np.ndarray
    """bool [s], True = slot that an image embedding fills."""
    images: list[bytes | EntityImage] = field(default_factory=list)
    """Prompt images, in the order of their slots."""
    target: memoryview | None = None
    """The image the U-Net learns to draw (`instruct`), encoded; mapped, read when it is used."""
    caption: str | None = None
    """The words behind the tokens (`align` hands them to the CLIP text encoder)."""


@dataclass(frozen=True)
class PromptSample:
    """A prompt at its place in the stream, with the names that a report of a bad image needs."""

    position: int
    prompt: Prompt
    dataset: str
    key: str
    index: int
    """Its number in the dataset."""
    replacement: int
    """Replacement index; see order.SampleOrder.replacement."""


@dataclass(frozen=True)
class CaptionSample:
    """A caption for `align`: our tokens and those of the CLIP text encoder, unpadded."""

    position: int
    tokens: np.ndarray
    """int64 [s], starts with <s>."""
    clip_tokens: np.ndarray
    """int64 [num_queries], padded."""


@dataclass(frozen=True)
class RowImage:
    """One image of a packed row and the stretch of the row that depends on it."""

    image: bytes
    start: int
    """Row position of its <image> token."""
    document_end: int
    """Row position after the last token of its document in this row."""
    dataset: str
    key: str


@dataclass(frozen=True)
class PackedRow:
    """One row of `pretrain`: complete sentences of several documents, one after the other."""

    position: int
    tokens: np.ndarray
    """int64 [<= seq_length + 1]; inputs are all but the last, labels all but the first."""
    image_mask: np.ndarray
    """bool, same length, True = image slot."""
    label_mask: np.ndarray
    """bool, same length, True = this token counts in the loss when it is the label."""
    images: list[RowImage]


Sample = PromptSample | CaptionSample | PackedRow
SampleT = TypeVar("SampleT", bound=Sample)
Split = Literal["train", "heldout"]
"""Which stream of a stage: the one it learns from, or the held-out one."""

FOR_THE_HOST = frozenset({"stream_positions", "replacements", "bad_samples"})
"""What only the program reads of a batch: it stays in the host's memory."""


class StreamDataset(Protocol[SampleT]):
    """An endless stream of samples of one kind; everything is a pure function of the position.

    `position` counts samples of the stage over all epochs, from 0.
    """

    def __getitem__(self, position: int) -> SampleT:
        """The sample at `position`, images still encoded."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of the content of each dataset of the mixture, by name."""
        ...

    def lengths(self, positions: Sequence[int]) -> np.ndarray | None:
        """Tokens of the samples at `positions`, int64, image slots included, from the index alone.

        None where all rows of a global batch are equally long, so that it does not matter for the
        work which rank reads which sample.
        """
        ...

    def pad_to(self, samples: Sequence[SampleT], global_positions: Sequence[int]) -> int:
        """Tokens that the rows of the micro-batch `samples` are padded to.

        `global_positions` are those of the whole global batch.
        """
        ...

    def collate(self, samples: Sequence[SampleT], pad_to: int) -> dict[str, Tensor]:
        """The batch of `samples`, images decoded. A bad image is replaced and reported, and
        `bad_samples`, an int64 scalar, counts those of this batch.

        Rows grow beyond `pad_to` only where a replacement is longer than what it replaces.
        """
        ...


class ImageStream(StreamDataset[SampleT], Protocol[SampleT]):
    """A stream with images, which some ranks leave undecoded: they have no use for them.

    Its batches have `stream_positions` int64 [b] and `replacements` int64 [k]: the replacement
    index of every sample (`instruct`) or image (`pretrain`), 0 where it is the one drawn first.
    """

    def collate(
        self, samples: Sequence[SampleT], pad_to: int, replacements: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """A batch, as StreamDataset.collate makes it.

        Args:
            replacements: those of a rank that decoded the images of these positions. With them
                nothing is decoded here, and the batch is that rank's except for the images.
        """
        ...
