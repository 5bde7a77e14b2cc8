"""Messages between decoder ranks and score ranks as frames of bytes.

A fixed header, then raw tensors: nothing is unpickled. What arrives is held against the limits of
the run before any of it is used; `BadMessage` says what is wrong with it.
Long because what is packed and what is unpacked have to be seen side by side.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from megatron_kosmosg.score.messages import Answer, Kind, Rows, ScoreRequest

Frames = list[Any]
"""Of one message: bytes, or views of a tensor's memory."""


class Message(IntEnum):
    """The kinds of messages between decoder ranks and score ranks."""

    HELLO = 1
    """Of a score rank: who it is, and whether it can work yet."""
    WELCOME = 2
    REFUSED = 3
    """To a score rank that may not take part, with the reason."""
    BEAT = 4
    """To a score rank: the decoder rank is there."""
    UNKNOWN = 5
    """To a score rank that has to say HELLO again."""
    PREPARE = 6
    """Rows whose condition will come."""
    ASK = 7
    ANSWER = 8
    FAILED = 9
    """Of a score rank that ends with an error."""
    LEAVE = 10
    """Of a score rank that ends because it was told to."""
    BYE = 11
    """To score ranks: this start of the run ends; `RunEnd`."""


class RunEnd(IntEnum):
    """How a start of a run ended."""

    DONE = 0
    STOPPED = 1
    """It was asked to stop, and its state is saved."""
    FAILED = 2


class BadMessage(ValueError):
    """Bytes that are no message, or one beyond the limits."""


@dataclass(frozen=True)
class Limits:
    """What a message of this run can hold; equal at both ends."""

    most_rows: int
    """Positions in a request."""
    condition: tuple[int, int]
    """(c, d) of a condition's row."""
    dtype: torch.dtype
    """Of the condition."""
    image_size: int
    """Most pixels per side of an image."""

    @property
    def most_bytes(self) -> int:
        """The most bytes in one frame, as it travels: encrypted."""
        numbers = _ASK.size + 2 * 8 * self.most_rows
        return max(PIECE_BYTES, MOST_WORDS, numbers) + _ENCRYPTION

    @property
    def most_frames(self) -> int:
        """The most frames in one message."""
        c, d = self.condition
        images = self.most_rows * 3 * self.image_size**2 * 4
        largest = max((self.most_rows + 1) * c * d * 4, images)
        return _FRAMES_BESIDES + -(-largest // PIECE_BYTES)


PIECE_BYTES = 1 << 18
"""Of a tensor in one frame. While one is encrypted here, another is sent and a third decrypted
there: a message of one frame would take each of these steps as a whole."""
MOST_WORDS = 1 << 18
"""Bytes of a JSON part."""
_ENCRYPTION = 1024
"""More than CURVE adds to a frame (33 bytes)."""
_FRAMES_BESIDES = 4
"""In a message, beside the pieces of a tensor."""
_MAGIC, _VERSION = b"KGSR", 1
_HEADER = struct.Struct("<4sBBHQ")
"""Magic, version, message, nothing, request id."""
_ASK = struct.Struct("<BBBxIIIIIf")
"""Kind, is_heldout, dtype, image size, positions, rows, c, d, loss scale."""
_ROWS = struct.Struct("<BxxxI")
"""is_heldout, positions."""
_ANSWER = struct.Struct("<BxHIIfdd")
"""Signal, requests that wait, bad samples, values, loss, idle, seconds."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pack(message: Message, request_id: int = 0, *parts: Any) -> Frames:
    """A message of a header and parts that are bytes already."""
    return [_HEADER.pack(_MAGIC, _VERSION, message, 0, request_id), *parts]


def pack_words(message: Message, words: dict[str, Any]) -> Frames:
    """A message of a few words, as frames."""
    return pack(message, 0, json.dumps(words).encode())


def unpack(frames: Sequence[Any], limits: Limits) -> tuple[Message, int, Sequence[Any]]:
    """(the message's kind, its request id, its other frames)."""
    if not 1 <= len(frames) <= limits.most_frames:
        raise BadMessage(f"{len(frames)} frames")
    magic, version, message, _, request_id = _fields(_HEADER, frames[0])
    if magic != _MAGIC:
        raise BadMessage("another protocol")
    if version != _VERSION:
        raise BadMessage(f"version {version} of the messages, this program speaks {_VERSION}")
    try:
        return Message(message), request_id, frames[1:]
    except ValueError as error:
        raise BadMessage(f"message {message}") from error


def unpack_words(parts: Sequence[Any]) -> dict[str, Any]:
    """The words in the frames of a message of a few words."""
    if len(parts) != 1 or len(_bytes(parts[0])) > MOST_WORDS:
        raise BadMessage("words of another form")
    try:
        words = json.loads(bytes(_bytes(parts[0])))
    except ValueError as error:
        raise BadMessage("words that are no JSON") from error
    if not isinstance(words, dict):
        raise BadMessage("words of another form")
    return words


def pack_prepare(rows: Rows) -> Frames:
    """The frames of a PREPARE message."""
    head = _ROWS.pack(rows.is_heldout, len(rows.positions))
    return pack(Message.PREPARE, 0, head, *_numbers(rows))


def unpack_prepare(parts: Sequence[Any], limits: Limits) -> Rows:
    if len(parts) != 3:
        raise BadMessage("rows of another form")
    is_heldout, n = _fields(_ROWS, parts[0])
    return _rows(parts[1], parts[2], n, bool(is_heldout), limits)


def pack_request(request_id: int, request: ScoreRequest) -> Frames:
    """The frames of an ASK message."""
    count, c, d = request.condition.shape
    rows = request.rows
    head = _ASK.pack(
        request.kind,
        rows.is_heldout,
        _DTYPES[request.condition.dtype],
        request.image_size,
        len(rows.positions),
        count,
        c,
        d,
        float(request.scale),
    )
    positions, replacements = _numbers(rows)
    head += positions + replacements
    return pack(Message.ASK, request_id, head, *_pieces(request.condition))


def unpack_request(parts: Sequence[Any], limits: Limits) -> ScoreRequest:
    if len(parts) < 2:
        raise BadMessage("a request of another form")
    head = _bytes(parts[0])
    kind, is_heldout, dtype, size, n, count, c, d, scale = _fields(_ASK, head[: _ASK.size])
    if kind not in list(Kind) or dtype != _DTYPES[limits.dtype] or (c, d) != limits.condition:
        raise BadMessage(f"a request of kind {kind}, dtype {dtype}, rows of {c} x {d}")
    if size > limits.image_size or count != n + (kind == Kind.IMAGES):
        raise BadMessage(f"{count} conditions for {n} positions, images of {size} pixels")
    numbers = head[_ASK.size :]
    half = len(numbers) // 2
    rows = _rows(numbers[:half], numbers[half:], n, bool(is_heldout), limits)
    condition = _tensor(parts[1:], (count, c, d), limits.dtype)
    return ScoreRequest(Kind(kind), rows, condition, torch.tensor(scale), size)


def pack_answer(request_id: int, answer: Answer) -> Frames:
    """The frames of an ANSWER message."""
    numbers = answer.loss, answer.idle, answer.seconds
    waiting = min(answer.waiting, 0xFFFF)
    counts = waiting, answer.bad_samples, answer.payload.numel()
    head = _ANSWER.pack(answer.signal, *counts, *numbers)
    return pack(Message.ANSWER, request_id, head, *_pieces(answer.payload))


def unpack_answer(parts: Sequence[Any], num_values: int) -> Answer:
    """The answer in some frames. `num_values` is what the request asked for."""
    if len(parts) < 2:
        raise BadMessage("an answer of another form")
    signal, waiting, bad_samples, values, loss, idle, seconds = _fields(_ANSWER, parts[0])
    if values != num_values:
        raise BadMessage(f"{values} numbers where {num_values} were asked for")
    payload = _tensor(parts[1:], (num_values,), torch.float32)
    return Answer(loss, bad_samples, signal, idle, seconds, payload, waiting)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, not copied."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _numbers(rows: Rows) -> tuple[bytes, bytes]:
    found = (np.array(values, "<i8").tobytes() for values in (rows.positions, rows.replacements))
    positions, replacements = found
    return positions, replacements


def _rows(positions: Any, replacements: Any, n: int, is_heldout: bool, limits: Limits) -> Rows:
    if not 1 <= n <= limits.most_rows:
        raise BadMessage(f"{n} positions in a request, {limits.most_rows} at most")
    parts = [_bytes(part) for part in (positions, replacements)]
    if any(len(part) != 8 * n for part in parts):
        raise BadMessage("positions of another length than said")
    first, second = (tuple(np.frombuffer(part, "<i8").tolist()) for part in parts)
    return Rows(first, second, is_heldout)


def _pieces(tensor: torch.Tensor) -> list[memoryview]:
    """The tensor's memory in frames; an empty tensor has one, too."""
    whole = memory(tensor)
    return [whole[at : at + PIECE_BYTES] for at in range(0, max(1, len(whole)), PIECE_BYTES)]


def _tensor(parts: Sequence[Any], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of its own: memory of torch's, whose alignment does not depend on the message."""
    values = torch.empty(shape, dtype=dtype)
    pieces = [_bytes(part) for part in parts]
    num_bytes = sum(map(len, pieces))
    if num_bytes != values.nbytes:
        raise BadMessage(f"{num_bytes} bytes where {values.nbytes} were said")
    whole, at = memory(values), 0
    for piece in pieces:
        whole[at : at + len(piece)] = piece
        at += len(piece)
    return values


def _fields(form: struct.Struct, part: Any) -> tuple:
    data = _bytes(part)
    if len(data) != form.size:
        raise BadMessage("a header of another length")
    return form.unpack(data)


def _bytes(part: Any) -> memoryview:
    """The bytes of a frame as the transport gives it, or of bytes."""
    data = memoryview(getattr(part, "buffer", part))
    return data if data.format == "B" else data.cast("B")
