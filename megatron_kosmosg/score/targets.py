"""Targets of conditions, read ahead by a score rank, and encoded before their condition comes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.instruct_stream import InstructStream
from megatron_kosmosg.data.normalise import normalise, target_transform
from megatron_kosmosg.data.samples import Split
from megatron_kosmosg.parallel.transfers import pinned, upload
from megatron_kosmosg.score.keyed_noise import KeyedNoise, noise_of_batch
from megatron_kosmosg.score.messages import Rows

OpenStream = Callable[[Split], InstructStream]
"""The stream of a split, reading targets."""
Encode = Callable[[torch.Tensor], torch.Tensor]
"""Moments of pixels."""
_MOST_AHEAD = 8
"""Requests whose targets are kept; announced ones that never came make room for others."""


@dataclass
class Targets:
    """The target images of the rows of a request."""

    values: torch.Tensor
    """Pixels as the VAE takes them, or the moments of their posteriors; on the device."""
    weights: torch.Tensor
    """Of the images in the sum of losses, 0 for a bad one; on the host."""
    keyed_noise: KeyedNoise | None
    """Noise, where the stream draws it; on the device."""


class TargetReader:
    """Reads in threads what is announced or asked for. `close` it."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        open_stream: OpenStream,
        encode: Encode | None = None,
    ) -> None:
        """A stream is opened when targets of its split are first read.

        Args:
            open_stream: opens the stream of a split.
            encode: encodes targets ahead of their condition; None leaves pixels as they are.
        """
        self._config, self._device, self._encode = config, device, encode
        self._open_stream = open_stream
        self._streams: dict[Split, InstructStream] = {}
        self._opening = threading.Lock()
        threads = config.data.num_workers
        self._pool = ThreadPoolExecutor(threads, "target-reader") if threads else None
        self._lock = threading.Lock()
        self._read: OrderedDict[Rows, Future[dict[str, torch.Tensor]] | None] = OrderedDict()
        """None: to be read in the program's own thread, which has no others."""
        self._encoded: dict[Rows, Targets] = {}
        self.on_read: Callable[[], None] = lambda: None
        """Is called, in a thread, when announced targets have been read."""

    def prepare(self, rows: Rows) -> None:
        """Starts to read the targets of rows whose condition will come."""
        with self._lock:
            if rows in self._read:
                return
            while len(self._read) >= _MOST_AHEAD:
                oldest, forgotten = self._read.popitem(last=False)
                self._encoded.pop(oldest, None)
                if forgotten is not None:
                    forgotten.cancel()
            future = None if self._pool is None else self._pool.submit(self._batch, rows)
            self._read[rows] = future
        if future is None:
            self.on_read()
        else:
            future.add_done_callback(lambda _: self.on_read())

    def encode_ahead(self) -> bool:
        """Encodes one request's targets that have been read; False when there are none."""
        with self._lock:
            done = (rows for rows, f in self._read.items() if f is None or _is_whole(f))
            rows = next((rows for rows in done if rows not in self._encoded), None)
            future = None if rows is None else self._read[rows]
        if rows is None:
            return False
        batch = self._batch(rows) if future is None else future.result()
        self._encoded[rows] = self._on_device(batch)
        return True

    def take(self, rows: Rows) -> Targets:
        """The targets of the request for `rows`, read now where they were not announced."""
        with self._lock:
            future = self._read.pop(rows, None)
            encoded = self._encoded.pop(rows, None)
        if encoded is not None:
            return encoded
        batch = self._batch(rows) if future is None else future.result()
        return self._on_device(batch)

    def fingerprints(self, split: Split) -> dict[str, str]:
        """The fingerprints of the datasets of a split, by name."""
        return self._stream(split).fingerprints()

    def close(self) -> None:
        """Ends reading ahead, and its threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _stream(self, split: Split) -> InstructStream:
        with self._opening:
            if split not in self._streams:
                self._streams[split] = self._open_stream(split)
            return self._streams[split]

    def _batch(self, rows: Rows) -> dict[str, torch.Tensor]:
        stream = self._stream(rows.split)
        samples = [stream[position] for position in rows.positions]
        batch = stream.collate(samples, stream.pad_to(samples, rows.positions))
        # Where a prompt image was bad, which is not read here, another sample took the place.
        for row, replacement in enumerate(rows.replacements):
            if int(batch["replacements"][row]) != replacement:
                other = stream.collate([stream[rows.positions[row]]], 0, [replacement])
                for name in (_key(batch), "target_weights"):
                    batch[name][row] = other[name][0]
        return pinned(batch, self._device)

    def _on_device(self, batch: dict[str, torch.Tensor]) -> Targets:
        values = upload(batch[_key(batch)], self._device)
        if values.dtype is torch.uint8:
            values = normalise(values, target_transform(self._config))
        if values.ndim == 4 and self._encode is not None:
            values = self._encode(values)
        keyed_noise = noise_of_batch(batch)
        if keyed_noise is not None:
            keyed_noise = {name: upload(noise, self._device) for name, noise in keyed_noise.items()}
        return Targets(values, batch["target_weights"], keyed_noise)


def _is_whole(future: Future[dict[str, torch.Tensor]]) -> bool:
    """Whether it was read; an error is raised where the targets are asked for."""
    return future.done() and not future.cancelled() and future.exception() is None


def _key(batch: dict[str, torch.Tensor]) -> str:
    return "target_moments" if "target_moments" in batch else "target_pixel_values"
