"""The stream of `align`: captions, tokenised for the decoder and for the CLIP text encoder.

As in the authors' loader, captions that CLIP would truncate are left out, and those of more than
num_queries + 8 (there 85) of our tokens. Rows are padded to the longest of the *global* batch,
because the reconstruction loss depends on the padded length and must not depend on the layout.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from megatron_kosmosg.data.blend import Blend
from megatron_kosmosg.data.order import SampleOrder
from megatron_kosmosg.data.padding import pad_rows
from megatron_kosmosg.data.samples import CaptionSample
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.tokenizer import Tokenizer

EXTRA_TOKENS = 8
"""Our tokens that a caption may have beyond the text encoder's positions."""
MAX_ATTEMPTS = 100
BLOCK, BLOCKS_KEPT = 256, 64
"""Captions that are tokenised together, and how many such blocks are remembered."""


class AlignStream:
    """Captions; see samples.StreamDataset. Reads no pictures."""

    def __init__(
        self,
        blend: Blend,
        stores: dict[str, SampleStore],
        orders: dict[str, SampleOrder],
        tokenizer: Tokenizer,
        clip_tokenizer: CLIPTokenizer,
        num_queries: int,
        max_length: int,
        image_size: int,
    ) -> None:
        """`num_queries`: positions of the CLIP text encoder. `max_length`: tokens, with <s>."""
        self._blend, self._stores, self._orders = blend, stores, orders
        self._tokenizer, self._clip_tokenizer = tokenizer, clip_tokenizer
        self._num_queries = num_queries
        self._max_tokens = min(num_queries + EXTRA_TOKENS, max_length - 1)
        self._image_size = image_size
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, list[CaptionSample]] = OrderedDict()

    def __getitem__(self, position: int) -> CaptionSample:
        block, place = divmod(position, BLOCK)
        with self._lock:
            if block not in self._blocks:
                self._blocks[block] = self._read_block(range(block * BLOCK, (block + 1) * BLOCK))
                if len(self._blocks) > BLOCKS_KEPT:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(block)
            return self._blocks[block][place]

    def length(self, position: int) -> int:
        return len(self[position].tokens)

    def pad_to(self, samples: Sequence[CaptionSample], global_positions: Sequence[int]) -> int:
        """The longest row of the global batch."""
        return max(self.length(position) for position in global_positions)

    def statistics(self) -> dict[str, int]:
        return {"bad_samples": 0}

    def collate(self, samples: Sequence[CaptionSample], pad_to: int) -> dict[str, Tensor]:
        """tokens, image_mask (all False), padding_mask [b, s]; pixel_values [0, 3, H, W];
        clip_tokens int64 [b, num_queries]."""
        tokens = [sample.tokens for sample in samples]
        rows = pad_rows(
            tokens, [np.zeros(len(row), bool) for row in tokens], pad_to, self._tokenizer.pad_id
        )
        clip_tokens = np.stack([sample.clip_tokens for sample in samples])
        return rows | {
            "pixel_values": torch.zeros(0, 3, self._image_size, self._image_size),
            "clip_tokens": torch.from_numpy(clip_tokens),
        }

    def _read_block(self, positions: range) -> list[CaptionSample]:
        found: dict[int, CaptionSample] = {}
        for attempt in range(MAX_ATTEMPTS):
            missing = [position for position in positions if position not in found]
            if not missing:
                return [found[position] for position in positions]
            candidates = [self._candidate(position, attempt) for position in missing]
            encoded = self._clip_tokenizer([caption for _, caption in candidates])["input_ids"]
            for position, (ids, _), clip_ids in zip(missing, candidates, encoded, strict=True):
                if len(clip_ids) <= self._num_queries and len(ids) <= self._max_tokens:
                    tokens = np.concatenate([[self._tokenizer.bos_id], ids])
                    found[position] = CaptionSample(position, tokens, self._pad_clip(clip_ids))
        raise ValueError(
            f"{MAX_ATTEMPTS} captions in a row are longer than {self._num_queries} CLIP tokens "
            f"(model.aligner.num_queries) or {self._max_tokens} tokens (data.seq_length)"
        )

    def _candidate(self, position: int, attempt: int) -> tuple[np.ndarray, str]:
        draw = self._blend[position]
        index = self._orders[draw.name].candidate(draw.ordinal, position, attempt)
        raw = self._stores[draw.name][index]
        return raw.tokens()[0].astype(np.int64), raw.info["caption"]

    def _pad_clip(self, ids: list[int]) -> np.ndarray:
        padded = np.full(self._num_queries, self._clip_tokenizer.pad_token_id, np.int64)
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
