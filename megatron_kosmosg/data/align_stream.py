"""The stream of `align`: captions, tokenised for the decoder and for the CLIP text encoder.

As in the authors' loader, captions that CLIP would truncate are left out, and those of more than
num_queries + 8 (there 85) of our tokens. Rows are padded to one length over the *global* batch,
because the reconstruction loss depends on the padded length and must not depend on the layout. That
length comes from the index alone: a caption that CLIP would truncate is replaced by one that has no
more of our tokens, so no rank has to tokenise another rank's captions to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from megatron_kosmosg.config.errors import ConfigError
from megatron_kosmosg.data.blend import Blend
from megatron_kosmosg.data.kinds.kind import Captions
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.padding import pad_rows
from megatron_kosmosg.data.samples import CaptionSample
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.tokenizer import Tokenizer

EXTRA_TOKENS = 8
"""Our tokens that a caption may have beyond the text encoder's positions."""
MAX_REPLACEMENTS = 1000


class AlignStream:
    """The stream of captions for `align`, which reads no images; its methods are explained at
    samples.StreamDataset."""

    def __init__(
        self,
        blend: Blend,
        stores: dict[str, SampleStore],
        captions: dict[str, Captions],
        orders: dict[str, SampleOrder],
        tokenizer: Tokenizer,
        clip_tokenizer: CLIPTokenizer,
        num_queries: int,
        max_length: int,
        image_size: int,
        packs: bool = False,
    ) -> None:
        """Joins the datasets of the mixture `blend` into one stream.

        Args:
            num_queries: positions of the CLIP text encoder.
            max_length: tokens of the longest caption, with <s>.
            packs: whether prompts are also given end to end, see padding.pad_rows.
        """
        self._blend, self._stores, self._orders = blend, stores, orders
        self._captions = captions
        self._tokenizer = tokenizer
        self._clip_pad_id = clip_tokenizer.pad_token_id
        self._clip_encode = clip_tokenizer.backend_tokenizer.encode
        self._num_queries = num_queries
        self._max_tokens = min(num_queries + EXTRA_TOKENS, max_length - 1)
        self._image_size = image_size
        self._packs = packs

    def __getitem__(self, position: int) -> CaptionSample:
        blended = self._blend[position]
        store, order = self._stores[blended.name], self._orders[blended.name]
        captions = self._captions[blended.name]
        limit = self._max_tokens
        for replacement in range(MAX_REPLACEMENTS):
            index = order.replacement(blended.ordinal, position, replacement)
            num_tokens = int(store.part_lengths(np.array([index]), captions.tokens)[0])
            if num_tokens > limit:
                continue
            limit = num_tokens  # what pad_to counted for this position
            raw = store.first_parts(index, captions.tokens + 1)  # its image is not looked at
            clip_ids = self._clip_encode(captions.words(raw)).ids
            if len(clip_ids) <= self._num_queries:
                tokens = np.concatenate([[self._tokenizer.bos_id], raw.parts[captions.tokens]])
                return CaptionSample(position, tokens.astype(np.int64), self._pad_clip(clip_ids))
        raise self._nothing_fits()

    def fingerprints(self) -> dict[str, str]:
        return {name: store.fingerprint() for name, store in self._stores.items()}

    def lengths(self, positions: Sequence[int]) -> None:
        """None, which says that all rows of a global batch are equally long."""

    def pad_to(self, samples: Sequence[CaptionSample], global_positions: Sequence[int]) -> int:
        """The longest row of the global batch, before CLIP's limit replaces any; packed, where
        padding does not count in the loss, that of `samples`."""
        if self._packs:
            return max(len(sample.tokens) for sample in samples)
        longest = 0
        dataset_indices, ordinals = self._blend.take(np.asarray(global_positions))
        for i, name in enumerate(self._blend.names):
            in_dataset = dataset_indices == i
            if not in_dataset.any():
                continue
            indices = self._orders[name].take(ordinals[in_dataset])
            lengths = self._stores[name].part_lengths(indices, self._captions[name].tokens)
            for place in np.flatnonzero(lengths > self._max_tokens).tolist():
                position = int(np.asarray(global_positions)[in_dataset][place])
                lengths[place] = self._first_that_fits(
                    name, int(ordinals[in_dataset][place]), position
                )
            longest = max(longest, int(lengths.max()))
        return 1 + longest

    def collate(self, samples: Sequence[CaptionSample], pad_to: int) -> dict[str, Tensor]:
        """A batch of captions. tokens, image_mask (all False) and padding_mask are [b, s], `packed`
        is as pad_rows gives it; pixel_values [0, 3, H, W]; clip_tokens int64 [b, num_queries];
        bad_samples int64 [], always 0."""
        tokens = [sample.tokens for sample in samples]
        rows = pad_rows(
            tokens,
            [np.zeros(len(row), bool) for row in tokens],
            pad_to,
            self._tokenizer.pad_id,
            packs=self._packs,
        )
        clip_tokens = np.stack([sample.clip_tokens for sample in samples])
        return rows | {
            "pixel_values": torch.zeros(0, 3, *[self._image_size] * 2, dtype=torch.uint8),
            "clip_tokens": torch.from_numpy(clip_tokens),
            "bad_samples": torch.tensor(0),
        }

    def _first_that_fits(self, name: str, ordinal: int, position: int) -> int:
        """Our tokens of the first replacement that is short enough."""
        for replacement in range(1, MAX_REPLACEMENTS):
            index = self._orders[name].replacement(ordinal, position, replacement)
            part = self._captions[name].tokens
            length = int(self._stores[name].part_lengths(np.array([index]), part)[0])
            if length <= self._max_tokens:
                return length
        raise self._nothing_fits()

    def _nothing_fits(self) -> ConfigError:
        return ConfigError(
            f"{MAX_REPLACEMENTS} captions in a row are longer than {self._num_queries} CLIP tokens "
            f"(model.aligner.num_queries) or {self._max_tokens} tokens (data.seq_length)"
        )

    def _pad_clip(self, ids: list[int]) -> np.ndarray:
        padded = np.full(self._num_queries, self._clip_pad_id, np.int64)
        padded[: len(ids)] = ids
        return padded


def load_clip_tokenizer(folder: str | None) -> CLIPTokenizer:
    """The tokenizer in `folder`/tokenizer, from disk only."""
    path = Path(folder or "") / "tokenizer"
    if folder is None or not path.is_dir():
        raise FileNotFoundError(
            f"no CLIP tokenizer at {path}; set model.clip_text.path to a folder that holds "
            "`tokenizer/` and `text_encoder/`"
        )
    return CLIPTokenizer.from_pretrained(path, local_files_only=True)
