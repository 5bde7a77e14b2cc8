"""What a kind of sample is: all that the rooms of the package need to know of it, in one object.

A record becomes a stored sample (`convert`); each stage that reads the kind says how it reads it
(`pretrain`, `align`, `instruct`; None where it does not); the check of a dataset and the sizes that
plans reckon with lie here, too. Needs no torch: workers of preprocessing and plans start without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_kosmosg.config.schema import DataConfig
from megatron_kosmosg.data.kinds.record import Record
from megatron_kosmosg.data.samples import Prompt
from megatron_kosmosg.data.sequence import SequenceBuilder, SequenceFormat
from megatron_kosmosg.data.stored_sample import (
    IMAGE,
    TOKEN_BYTES,
    TOKEN_TYPE,
    TOKENS,
    PartSizes,
    RawSample,
    StoredPart,
    strip_document_end,
)

if TYPE_CHECKING:
    import numpy as np

    from megatron_kosmosg.data.random_keys import SampleKey
    from megatron_kosmosg.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Converted:
    """One sample as it is going to be stored."""

    parts: list[StoredPart]
    """The JSON part first."""
    left_out: tuple[str, ...] = ()
    """What the sample lacks although it is kept, such as "images: image is truncated"; one entry
    each."""

    @property
    def num_tokens(self) -> int:
        """Text tokens; the readings of a caption with and without its entities both count."""
        tokens = (len(part.data) for part in self.parts if part.mode == TOKENS)
        return sum(tokens) // TOKEN_BYTES

    @property
    def num_images(self) -> int:
        """Number of images, masks included."""
        return sum(part.mode == IMAGE for part in self.parts)


class ConversionOptions(Protocol):
    """The options of preprocessing that only some kinds have, see SampleKind.options."""

    @property
    def min_images(self) -> int: ...

    @property
    def max_images(self) -> int | None: ...

    @property
    def drop_bad_images(self) -> bool: ...


class Conversion(Protocol):
    """What records are converted with. All methods raise Rejected."""

    @property
    def options(self) -> ConversionOptions: ...

    def encode(self, text: str) -> np.ndarray:
        """The token ids of a run of text."""
        ...

    def text_field(self, fields: dict[str, Any], name: str) -> tuple[str, np.ndarray]:
        """A field's text and its ids, of which there is one at least."""
        ...

    def image(self, record: Record, fields: dict[str, Any], name: str) -> bytes:
        """The stored form of a field's image, after it was verified."""
        ...

    def mask(self, record: Record, fields: dict[str, Any], name: str, image: bytes) -> bytes | None:
        """What is stored of the mask of `image`, a stored image, 255 = entity; None where the
        field is null."""
        ...


@dataclass(frozen=True)
class UsualSize:
    """The size of an ordinary prompt or packed row, for plans, which open no data."""

    length: int
    """Decoder positions: 64 an image, its two marks, a sentence."""
    images: float
    """In the prompt or row."""

    def within(self, seq_length: int) -> UsualSize:
        """The same size, cut at the longest prompt."""
        return UsualSize(min(self.length, seq_length), self.images)


def in_stored_order(modes: Sequence[int]) -> Sequence[int]:
    """The order of parts for kinds that are read in the order in which they are stored."""
    return range(len(modes))


@dataclass(frozen=True)
class PackedDocuments:
    """How `pretrain` reads a kind: <s> texts and images </s>, packed into rows."""

    images_per_row: float
    """Usual images of a packed row of 2,048 positions, for plans, which open no data."""
    reading_order: Callable[[Sequence[int]], Sequence[int]] = in_stored_order
    """(modes of the parts) -> numbers of the parts as they are read; the JSON part has none."""

    def document(self, raw: RawSample, sequence_format: SequenceFormat) -> SequenceBuilder:
        """The sample as a document: <s>, its texts and images in order, </s>."""
        builder = SequenceBuilder(sequence_format).add_start()
        for number in self.reading_order(raw.modes):
            part = raw.parts[number]
            if raw.modes[number] == TOKENS:
                builder.add_text(strip_document_end(part, sequence_format.tokenizer))
            else:
                builder.add_image(part.tobytes())
        return builder.add_end()

    def usual_size(self, seq_length: int) -> UsualSize:
        """The ordinary size of a packed row of `seq_length` tokens."""
        return UsualSize(seq_length, self.images_per_row * seq_length / 2048)

    def content(self, raw: RawSample, tokenizer: Tokenizer) -> list[np.ndarray | None]:
        """What a sentence table is made of: ids of each text, None for an image."""
        return [
            None if raw.modes[number] == IMAGE else strip_document_end(raw.parts[number], tokenizer)
            for number in self.reading_order(raw.modes)
        ]


@dataclass(frozen=True)
class Captions:
    """How `align` reads a kind: words for the decoder and for the CLIP text encoder."""

    tokens: int
    """Number of the part that holds the words' tokens."""
    words: Callable[[RawSample], str]
    """Of a sample whose parts behind the tokens are left out."""
    usual: UsualSize

    def usual_size(self, seq_length: int) -> UsualSize:
        """The ordinary size of a caption."""
        return self.usual.within(seq_length)


class PromptMaker(Protocol):
    """Turns the stored samples of one kind into prompts."""

    def length(self, sizes: PartSizes, key: SampleKey) -> int | None:
        """Tokens of the prompt that the call gives, None where the sample cannot be used."""
        ...

    def __call__(self, raw: RawSample, key: SampleKey) -> Prompt:
        """The prompt of a stored sample, with its target."""
        ...


@dataclass(frozen=True)
class Prompts:
    """How `instruct` reads a kind: a prompt, and the image to draw."""

    maker: Callable[[SequenceFormat, DataConfig], PromptMaker]
    target: Callable[[RawSample], memoryview]
    """The encoded image that the U-Net learns to draw."""
    usual: UsualSize

    def usual_size(self, seq_length: int) -> UsualSize:
        """The ordinary size of a prompt."""
        return self.usual.within(seq_length)


ImageSize = tuple[int, int] | None
"""(width, height) of an image as it is shown, None where it cannot be read."""


def nothing_more(raw: RawSample, sizes: Sequence[ImageSize]) -> Iterator[str]:
    """The check of kinds that have none of their own: finds nothing."""
    return iter(())


def no_masks(raw: RawSample) -> dict[int, int]:
    """The masks of kinds that store none."""
    return {}


@dataclass(frozen=True)
class SampleKind:
    """One kind of sample. Has `convert` or `plain_text`, not both."""

    name: str
    """What --kind and manifests call it."""
    record: str
    """Its records as help texts show them."""
    fields: tuple[str, ...]
    """What a record may hold besides its key, in our layout or in another that is read."""
    convert: Callable[[Record, Conversion], Converted] | None = None
    """Record -> stored sample. Raises Rejected."""
    plain_text: Callable[[Record], str] | None = None
    """Record -> document, for a kind that is stored as an ordinary Megatron token dataset: one
    sequence of ids a document, closed by </s>. Raises Rejected."""
    formats: tuple[str, ...] = ("jsonl", "tar", "parquet", "arrow", "files")
    """Input formats that hold such records."""
    options: tuple[str, ...] = ()
    """Fields of ConversionOptions that `convert` heeds."""
    part_modes: tuple[int, ...] | None = None
    """Modes of the parts but the JSON one, where all samples have the same."""
    masks: Callable[[RawSample], dict[int, int]] = no_masks
    """{number of a mask: number of its image} among the images of a stored sample."""
    check: Callable[[RawSample, Sequence[ImageSize]], Iterator[str]] = nothing_more
    """What is wrong with a stored sample beyond unreadable tokens and images, one line each."""
    pretrain: PackedDocuments | None = None
    align: Captions | None = None
    instruct: Prompts | None = None

    @property
    def is_plain_text(self) -> bool:
        """Whether samples are sequences of a token dataset, without JSON and images."""
        return self.plain_text is not None

    @property
    def item_type(self) -> np.dtype:
        """The type of one item of the dataset's sequences: a token id for plain text, a byte for
        all others."""
        import numpy as np  # not needed by help texts, which list the kinds

        return np.dtype(TOKEN_TYPE if self.is_plain_text else np.uint8)

    def use(self, stage: str) -> PackedDocuments | Captions | Prompts | None:
        """How `stage` reads the kind."""
        return {"pretrain": self.pretrain, "align": self.align, "instruct": self.instruct}[stage]
