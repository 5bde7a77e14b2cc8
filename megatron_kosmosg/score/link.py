"""The wire between decoder and score ranks: a condition goes out, loss and gradient come back.

A link joins two ranks: rank 0 of the last stage's tensor group and one score rank of its unit. Each
direction has a process group of its own, so that a condition never waits behind an answer that is
not there yet. Messages of one direction arrive in the order they were sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import torch
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store, Work

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.config.world import RankPlace, WorldLayout

_DECODER, _SCORE = 0, 1
"""Ranks inside a link's groups."""
_REQUEST_TIMEOUT = timedelta(days=1)


class LinkBroken(RuntimeError):
    """The rank at the other end is gone, or silent for too long; the message names it."""


class Kind(IntEnum):
    """What a decoder rank asks for."""

    GRADIENT = 0
    """Loss, and its gradient by the condition."""
    LOSS = 1
    """Loss alone."""
    PICTURES = 2
    """Pictures drawn from the condition, whose last row is the null condition."""
    END = 3
    """Nothing more; `number` is 1 when the run is done, 0 when it was asked to stop."""


@dataclass(frozen=True)
class Request:
    """One message to a score rank."""

    kind: Kind
    condition: torch.Tensor
    """[rows, c, d], in the dtype the U-Net runs in; no rows for END."""
    scale: torch.Tensor
    """Loss scale of the optimizer, scalar."""
    positions: torch.Tensor
    """Stream positions, int64 [n]: of the rows, or of the pictures."""
    attempts: torch.Tensor
    """int64 [n]: which draw filled the position (samples.PromptSample)."""
    number: int = 0
    """Of LOSS and GRADIENT: 1 for the held-out stream. Of PICTURES: pixels per side."""


@dataclass(frozen=True)
class Answer:
    """What a score rank computed."""

    loss: torch.Tensor
    """Sum over the rows, fp32 scalar."""
    bad_samples: torch.Tensor
    """Targets that could not be decoded: images that do not count; scalar."""
    signal: torch.Tensor
    """Number of the stop signal that the score rank got, 0 for none; scalar."""
    idle: torch.Tensor
    """Seconds that the score rank waited for this request; scalar."""
    payload: torch.Tensor
    """Flat fp32: gradient of the unscaled loss, or pixels."""


HEAD = 4
"""Numbers before an answer's payload."""

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

    def ask(self, request: Request) -> None:
        """Sends a request and returns; nothing is waited for."""
        n, rows = len(request.positions), len(request.condition)
        most = self._most_rows
        if n > most:
            raise ValueError(f"{n} positions in a request, {most} at most")
        words = torch.tensor([request.kind, request.number, n, rows], dtype=torch.float64)
        header = torch.zeros(5 + 2 * most, dtype=torch.float64, device=self._device)
        header[:4] = words.to(self._device, non_blocking=True)
        header[4] = request.scale
        header[5 : 5 + n] = request.positions
        header[5 + most : 5 + most + n] = request.attempts
        self._send(self._requests, header, _SCORE)
        if rows:
            self._send(self._requests, request.condition.contiguous(), _SCORE)

    def take_request(self, shape: tuple[int, int], dtype: torch.dtype) -> Request:
        """The next request; waits for it. shape: (c, d) of a condition's row; dtype: its."""
        most = self._most_rows
        header = torch.empty(5 + 2 * most, dtype=torch.float64, device=self._device)
        self._receive(self._requests, header, _DECODER)
        scale, header = header[4], header.cpu()
        kind, number, n, rows = (int(value) for value in header[:4])
        condition = torch.empty(rows, *shape, dtype=dtype, device=self._device)
        if rows:
            self._receive(self._requests, condition, _DECODER)
        positions = header[5 : 5 + n].long()
        attempts = header[5 + most : 5 + most + n].long()
        return Request(Kind(kind), condition, scale, positions, attempts, number)

    def reply(self, answer: Answer) -> None:
        """Sends an answer and returns."""
        values = (answer.loss, answer.bad_samples, answer.signal, answer.idle)
        head = torch.stack([value.detach().to(self._device, torch.float32) for value in values])
        self._send(self._answers, torch.cat([head, answer.payload.flatten()]), _DECODER)

    def take_answer(self, num_values: int) -> torch.Tensor:
        """fp32 [HEAD + num_values]: the next answer, waited for; `read_answer` unpacks it."""
        message = torch.empty(HEAD + num_values, dtype=torch.float32, device=self._device)
        self._receive(self._answers, message, _SCORE)
        return message

    def flush(self, most: int = 0) -> None:
        """Returns when all messages have been sent but the last `most`."""
        while len(self._sending) > most:
            work, _ = self._sending.popleft()
            with self._naming_the_peer("sending to"):
                work.wait()

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


def read_answer(message: torch.Tensor) -> Answer:
    """What `take_answer` received."""
    loss, bad_samples, signal, idle = message[:HEAD].unbind()
    return Answer(loss, bad_samples, signal, idle, message[HEAD:])


@dataclass(frozen=True)
class ScoreRank:
    """What a rank that holds the U-Net alone knows of the run."""

    device: torch.device
    world: WorldLayout
    place: RankPlace
    links: tuple[Link, ...]
    """To the replicas it serves, in order."""


def open_links(
    config: RunConfig, world: WorldLayout, place: RankPlace, store: Store, device: torch.device
) -> list[Link]:
    """This rank's links. A decoder rank's: to its score ranks, in the order of micro-batches; none
    unless it is tensor rank 0 of the last stage. A score rank's: to the replicas it serves."""
    timeout = timedelta(seconds=config.parallel.timeout_seconds)
    most_rows = max(config.training.micro_batch_size, config.logging.num_images)

    def link(replica: int, score_index: int, end: int) -> Link:
        name = f"score link {replica}-{score_index}"
        # Between requests lie evaluations, saves and data builds of any length; a decoder rank
        # that is gone closes the connection, and the launcher ends the job.
        patience = _REQUEST_TIMEOUT if end == _SCORE else timeout
        requests = _pair(PrefixStore(f"{name} requests", store), end, device, patience)
        answers = _pair(PrefixStore(f"{name} answers", store), end, device, timeout)
        score_rank = world.score_ranks(replica)[score_index]
        decoder_rank = world.decoder_rank(replica, world.pp_size - 1, 0)
        peer = f"score rank {score_rank}" if end == _DECODER else f"decoder rank {decoder_rank}"
        return Link(requests, answers, device, most_rows, peer)

    if place.role == "score":
        replicas = range(place.replica, place.replica + world.replicas_per_unit)
        return [link(replica, place.score_index, _SCORE) for replica in replicas]
    if place.tp_rank != 0 or place.pp_rank != world.pp_size - 1:
        return []
    return [link(place.replica, index, _DECODER) for index in range(world.score_ranks_per_unit)]


def _pair(store: Store, rank: int, device: torch.device, timeout: timedelta) -> ProcessGroup:
    """A group of two ranks outside torch.distributed's world, which has decoder ranks only."""
    if device.type == "cpu":
        return ProcessGroupGloo(store, rank, 2, timeout)
    from torch.distributed import ProcessGroupNCCL  # absent from builds without CUDA

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, 2, options)
