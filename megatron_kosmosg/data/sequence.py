"""Assembly of token sequences: text runs and images, as the authors' loaders lay them out.

An image takes <image>, `num_latent_queries` slots that also hold the id of <image>, and </image>.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_kosmosg.data.samples import EntityImage, Prompt

if TYPE_CHECKING:  # kinds of samples, which help texts list, need no numpy before they are used
    import numpy as np

    from megatron_kosmosg.data.tokenizer import Tokenizer

IMAGE_TAGS = 2
"""Positions that an image takes beside its slots."""
_TEXT, _TAG, _SLOT = 0, 1, 2


@dataclass(frozen=True)
class SequenceFormat:
    """The ids and the image width that every sequence of a run shares."""

    tokenizer: Tokenizer
    num_latent_queries: int

    @property
    def image_length(self) -> int:
        """Number of positions that one image takes."""
        return self.num_latent_queries + IMAGE_TAGS


class SequenceBuilder:
    """Collects tokens, masks and images from left to right."""

    def __init__(self, sequence_format: SequenceFormat) -> None:
        self._format = sequence_format
        self._tokens: list[np.ndarray] = []
        self._kinds: list[np.ndarray] = []
        self._images: list[bytes | EntityImage] = []
        self.image_starts: list[int] = []
        """Position of the <image> token of each image."""
        self.length = 0

    def add_start(self) -> SequenceBuilder:
        """Appends <s>, which is never a label that counts."""
        return self._add([self._format.tokenizer.bos_id], _TAG)

    def add_end(self) -> SequenceBuilder:
        """Appends </s>, which counts as a label like text does."""
        return self._add([self._format.tokenizer.eos_id], _TEXT)

    def add_text(self, ids: np.ndarray | list[int]) -> SequenceBuilder:
        """Appends text ids, which may be empty."""
        return self._add(ids, _TEXT)

    def add_image(self, image: bytes | EntityImage) -> SequenceBuilder:
        """Appends one image."""
        tokenizer = self._format.tokenizer
        self.image_starts.append(self.length)
        self._images.append(image)
        self._add([tokenizer.image_id], _TAG)
        self._add([tokenizer.image_id] * self._format.num_latent_queries, _SLOT)
        return self._add([tokenizer.end_image_id], _TAG)

    def prompt(self, target: memoryview | None = None, caption: str | None = None) -> Prompt:
        """The sequence collected so far, as a prompt."""
        return Prompt(self.tokens, self.image_mask, self._images, target, caption)

    @property
    def tokens(self) -> np.ndarray:
        """The token ids, int64 [s]."""
        import numpy as np

        return np.concatenate(self._tokens) if self._tokens else np.zeros(0, np.int64)

    @property
    def image_mask(self) -> np.ndarray:
        """Which positions are image slots, bool [s]."""
        return self._kind_array() == _SLOT

    @property
    def label_mask(self) -> np.ndarray:
        """Which positions are text or </s>, bool [s]: the only labels that count in a language
        loss."""
        return self._kind_array() == _TEXT

    @property
    def images(self) -> list[bytes | EntityImage]:
        """The images of the sequence, in order."""
        return self._images

    def _kind_array(self) -> np.ndarray:
        import numpy as np

        return np.concatenate(self._kinds) if self._kinds else np.zeros(0, np.int8)

    def _add(self, ids: np.ndarray | list[int], kind: int) -> SequenceBuilder:
        import numpy as np

        self._tokens.append(np.asarray(ids, np.int64))
        self._kinds.append(np.full(len(ids), kind, np.int8))
        self.length += len(ids)
        return self
