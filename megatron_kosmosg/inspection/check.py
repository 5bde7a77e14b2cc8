"""Reads every sample of a dataset as training would and says what is wrong with which."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megatron_kosmosg.data.fingerprint import dataset_fingerprint
from megatron_kosmosg.data.image_reading import read_image
from megatron_kosmosg.data.image_types import UnreadableImage
from megatron_kosmosg.data.kinds.kind import ImageSize
from megatron_kosmosg.data.remote_file import StorageError
from megatron_kosmosg.data.samples import EntityImage
from megatron_kosmosg.data.sentences import sentence_table
from megatron_kosmosg.data.store import SampleStore
from megatron_kosmosg.data.stored_sample import IMAGE, JSON, RawSample, strip_document_end
from megatron_kosmosg.data.stored_shards import SentenceTables
from megatron_kosmosg.data.tokenizer import Tokenizer
from megatron_kosmosg.progress import ProgressCallback

CHUNK = 256


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one sample, or (index None) with the dataset as a whole."""

    index: int | None
    key: str
    reason: str


def check_dataset(
    store: SampleStore,
    tokenizer: Tokenizer,
    num_workers: int,
    progress: ProgressCallback,
) -> Iterator[Problem]:
    """Reads every sample as training would, and yields all problems in the order of the samples;
    those of the dataset as a whole come last."""
    checker = _Checker(store, tokenizer)
    starts = range(0, len(store), CHUNK)
    progress(0, len(store))
    with ThreadPoolExecutor(num_workers, "check") as pool:
        for start, found in zip(starts, pool.map(checker.chunk, starts), strict=True):
            yield from found.problems
            checker.num_tokens += found.num_tokens
            checker.num_images += found.num_images
            progress(min(start + CHUNK, len(store)), len(store))
    yield from checker.whole()
    yield from checker.counts()


@dataclass
class _Found:
    problems: list[Problem]
    num_tokens: int = 0
    num_images: int = 0


class _Checker:
    def __init__(self, store: SampleStore, tokenizer: Tokenizer) -> None:
        self._store, self._tokenizer = store, tokenizer
        self.num_tokens = self.num_images = 0
        self._sentences: SentenceTables | None = None
        if store.sample_kind.pretrain is not None and store.manifest is not None:
            self._sentences = store.sentences(tokenizer)

    def chunk(self, start: int) -> _Found:
        """The contents of the samples from `start` on, and what is wrong with them."""
        found = _Found([])
        for index in range(start, min(start + CHUNK, len(self._store))):
            key = str(index)
            try:
                raw = self._store[index]
                key = str(raw.info.get("key", "")) or key
                reasons = list(self._sample(index, raw))
                found.num_tokens += sum(
                    len(strip_document_end(ids, self._tokenizer)) for ids in raw.tokens()
                )
                found.num_images += raw.modes.count(IMAGE)
            except StorageError:
                raise  # says nothing of the sample
            except (ValueError, KeyError, TypeError, OSError) as error:
                reasons = [f"cannot be read: {error}"]
            found.problems += [Problem(index, key, reason) for reason in reasons]
        return found

    def whole(self) -> Iterator[Problem]:
        """What is wrong with each shard as a whole: its index, its content, its numbers."""
        shards = self._store.shards
        for number, prefix in enumerate(shards.prefixes):
            try:
                reasons = list(shards[number].sequences.check_entries())
                if shards.entries and dataset_fingerprint(prefix) != (
                    shards.entries[number].fingerprint
                ):
                    reasons.append(f"shard {prefix} has another content than the manifest notes")
            except StorageError:
                raise  # nor of the shard
            except (ValueError, OSError) as error:
                reasons = [str(error)]
            yield from (Problem(None, "", reason) for reason in reasons)

    def counts(self) -> Iterator[Problem]:
        """Yields where the manifest counts something else than what is stored."""
        manifest = self._store.manifest
        if manifest is None:
            return
        for name, stated, counted in (
            ("num_tokens", manifest.num_tokens, self.num_tokens),
            ("num_images", manifest.num_images, self.num_images),
        ):
            if stated != counted:
                yield Problem(None, "", f"the manifest states {name} {stated}, found {counted}")

    def _sample(self, index: int, raw: RawSample) -> Iterator[str]:
        kind = self._store.sample_kind
        if not kind.is_plain_text and not raw.info.get("key"):
            yield "no key"
        if kind.part_modes is not None and tuple(raw.modes) != kind.part_modes:
            yield f"parts {raw.modes} instead of {list(kind.part_modes)} (0 text, 1 image)"
            return
        if JSON in raw.modes:
            yield "more than one JSON part"
        for ids in raw.tokens():
            yield from self._tokens(ids)
        images = raw.images()
        masked = kind.masks(raw)
        sizes: list[ImageSize] = []
        for i, data in enumerate(images):
            read = data if i not in masked else EntityImage(images[masked[i]], data)
            try:
                sizes.append(read_image(read).size)
            except UnreadableImage as error:
                sizes.append(None)
                yield f"image {i}: {error}"
        yield from kind.check(raw, sizes)
        if self._sentences is not None and kind.pretrain is not None:
            content = kind.pretrain.content(raw, self._tokenizer)
            stored, _ = self._sentences.take(np.array([index]))
            if not np.array_equal(stored, sentence_table(content, self._tokenizer)):
                yield "the sentence table does not fit the tokens; preprocess the dataset again"

    def _tokens(self, ids: np.ndarray) -> Iterator[str]:
        ids = strip_document_end(ids, self._tokenizer)
        text = (ids >= self._tokenizer.unk_id) & (ids <= self._tokenizer.num_pieces)
        if not text.all():
            yield f"token id {int(ids[~text][0])} is no text token"
