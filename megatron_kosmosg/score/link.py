"""The wire between decoder and score ranks: a condition goes out, loss and gradient come back.

A link joins two ranks: rank 0 of the last stage's tensor group and one score rank of its unit. Each
direction has a process group of its own, so that a condition never waits behind an answer that is
not there yet. Messages of one direction arrive in the order they were sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import ProcessGroup, Work

from megatron_kosmosg.parallel.devices import wait_for_device
from megatron_kosmosg.parallel.transfers import upload
from megatron_kosmosg.score.messages import HEAD, Answer, Kind, Request

DECODER, SCORE = 0, 1
"""Ranks inside a link's groups."""


class LinkBroken(RuntimeError):
    """The rank at the other end is gone, or silent for too long; the message names it."""


_HEADER = 7
"""Numbers before a request's positions and replacements; the last of them is the loss scale."""
MOST_IN_FLIGHT = 32
"""Requests of one decoder rank without an answer. A link holds more messages than this, so that
neither end waits to send while the other does."""
MOST_MESSAGES = 2 * MOST_IN_FLIGHT


class Link:
    """One end of a link."""

    def __init__(
        self,
        requests: ProcessGroup,
        answers: ProcessGroup,
        device: torch.device,
        most_rows: int,
        peer: str,
    ) -> None:
        """most_rows: upper bound of the positions in a request, equal at both ends. peer: names
        the rank at the other end in errors."""
        self._requests, self._answers, self._peer = requests, answers, peer
        self._device, self._most_rows = device, most_rows
        self._sending: deque[tuple[Work, torch.Tensor]] = deque()
        """A tensor must live until it has been sent."""
        self.num_bytes = 0
        """Sent and received since it was last set to 0."""

    def greet(self, end: int) -> None:
        """A number goes each way; call it at both ends (DECODER, SCORE) when the link is opened.

        NCCL makes a communicator at the first message, and then waits for the other end only as
        long as the store does, while that end may be building indices or loading a checkpoint.
        """
        number = torch.zeros(1, device=self._device)
        if end == DECODER:
            self._send(self._requests, number, SCORE)
            self._receive(self._answers, torch.empty_like(number), SCORE)
        else:
            self._receive(self._requests, torch.empty_like(number), DECODER)
            self._send(self._answers, number, DECODER)
        self.flush()
        self.num_bytes = 0

    def ask(self, request: Request) -> None:
        """Sends a request and returns; nothing is waited for."""
        n, rows = len(request.positions), len(request.condition)
        most = self._most_rows
        if n > most:
            raise ValueError(f"{n} positions in a request, {most} at most")
        words = (request.kind, request.is_heldout, request.image_size, request.is_done, n, rows)
        written = torch.zeros(_HEADER + 2 * most, dtype=torch.float64)
        written[: len(words)] = torch.tensor(words, dtype=torch.float64)
        written[_HEADER : _HEADER + n] = request.positions
        written[_HEADER + most : _HEADER + most + n] = request.replacements
        header = upload(written, self._device)
        header[len(words)] = request.scale
        self._send(self._requests, header, SCORE)
        if rows:
            self._send(self._requests, request.condition.contiguous(), SCORE)

    def take_request(self, shape: tuple[int, int], dtype: torch.dtype) -> Request:
        """The next request; waits for it. shape: (c, d) of a condition's row; dtype: its."""
        most = self._most_rows
        header = torch.empty(_HEADER + 2 * most, dtype=torch.float64, device=self._device)
        self._receive(self._requests, header, DECODER)
        scale, header = header[_HEADER - 1], header.cpu()
        kind, is_heldout, image_size, is_done, n, rows = map(int, header[: _HEADER - 1].tolist())
        condition = torch.empty(rows, *shape, dtype=dtype, device=self._device)
        if rows:
            self._receive(self._requests, condition, DECODER)
        positions = header[_HEADER : _HEADER + n].long()
        replacements = header[_HEADER + most : _HEADER + most + n].long()
        return Request(
            Kind(kind),
            condition,
            scale,
            positions,
            replacements,
            bool(is_heldout),
            image_size,
            bool(is_done),
        )

    def reply(self, answer: Answer) -> None:
        """Sends an answer and returns."""
        values = (answer.loss, answer.bad_samples, answer.signal, answer.idle)
        head = torch.stack([value.detach().to(self._device, torch.float32) for value in values])
        self._send(self._answers, torch.cat([head, answer.payload.flatten()]), DECODER)

    def take_answer(self, num_values: int) -> torch.Tensor:
        """fp32 [HEAD + num_values]: the next answer, waited for; `read_answer` unpacks it."""
        message = torch.empty(HEAD + num_values, dtype=torch.float32, device=self._device)
        self._receive(self._answers, message, SCORE)
        return message

    def flush(self, most: int = 0) -> None:
        """Returns when all messages have been sent but the last `most`."""
        while len(self._sending) > most:
            work, _ = self._sending.popleft()
            with self._naming_the_peer("sending to"):
                work.wait()

    def finish(self) -> None:
        """Returns when all messages have left this process, which may end then."""
        self.flush()
        wait_for_device(self._device)  # NCCL's `wait` orders streams and returns

    def _send(self, group: ProcessGroup, tensor: torch.Tensor, to: int) -> None:
        self.flush(MOST_MESSAGES)
        with self._naming_the_peer("sending to"):
            self._sending.append((group.send([tensor], to, 0), tensor))
        self.num_bytes += tensor.numel() * tensor.element_size()

    def _receive(self, group: ProcessGroup, tensor: torch.Tensor, source: int) -> None:
        with self._naming_the_peer("waiting for"):
            group.recv([tensor], source, 0).wait()
        self.num_bytes += tensor.numel() * tensor.element_size()

    @contextmanager
    def _naming_the_peer(self, doing: str) -> Iterator[None]:
        """On CUDA a wait orders streams and returns; a broken link then ends in NCCL's watchdog."""
        try:
            yield
        except RuntimeError as error:
            raise LinkBroken(
                f"{doing} {self._peer} failed: it ended, or gave no sign for "
                f"parallel.timeout_seconds ({str(error).splitlines()[0]})"
            ) from error
