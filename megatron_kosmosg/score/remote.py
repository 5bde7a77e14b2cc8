"""The decoder's end of the score ranks: a condition is sent at once, its answer awaited later.

In training the answer is awaited in backward, so that forward passes run ahead of the U-Net;
without gradients, when the pass over the global batch ends. Tensor rank 0 talks, the others get
what it got. A micro-batch goes whole to one score rank; its rows are split where there are fewer
micro-batches than ranks in the config, however many there are at the moment.
Long because asking, awaiting and counting share the order of the micro-batches.
"""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_kosmosg.data.balance import row_share
from megatron_kosmosg.monitoring.signals import STOP_SIGNALS
from megatron_kosmosg.monitoring.spans import SEND, WAIT, RecordSpan, no_record
from megatron_kosmosg.monitoring.stopwatch import Stopwatch
from megatron_kosmosg.parallel.transfers import Download, upload
from megatron_kosmosg.score.fleet import Fleet
from megatron_kosmosg.score.messages import Answer, Kind, Rows, ScoreRequest
from megatron_kosmosg.score.wire import RunEnd

_MOST_IN_FLIGHT = 16
"""Requests without gradients that run ahead of their answers."""
_HEAD = 2
"""Numbers before the gradient in what tensor ranks are told: loss, bad targets."""
_GIVEN_UP = signal.SIGUSR1
"""What this rank gives itself when no score rank is left."""


@dataclass
class ScoreWork:
    """What passed between decoder and score ranks since the last count."""

    waited: float = 0.0
    """Seconds that this decoder rank waited for answers."""
    idle: float = 0.0
    """Seconds that the score ranks waited for requests, summed over them."""
    num_bytes: int = 0
    bad_samples: int = 0
    """Targets that could not be decoded."""
    unanswered: int = 0
    """Requests that nobody will answer: no score rank is left, and none came."""
    ranks: int = 0
    """Score ranks that work for this replica now."""
    queued: int = 0
    """Requests that wait for a free one now."""
    latency: float = 0.0
    """Mean seconds from a request to its answer, waiting behind others left out."""


class RemoteScore:
    """The score ranks as a rank of the last pipeline stage sees them."""

    def __init__(
        self,
        fleet: Fleet | None,
        num_score_ranks: int,
        num_microbatches: int,
        tp_group: ProcessGroup,
        device: torch.device,
    ) -> None:
        """Nothing is sent before `loss` is called.

        Args:
            fleet: the links to score ranks, on tensor rank 0; None on the others.
            num_score_ranks: score ranks of this replica by the config.
            num_microbatches: of one global batch.
        """
        self._fleet, self._num_score_ranks = fleet, num_score_ranks
        self._num_microbatches, self._tp_group = num_microbatches, tp_group
        self._number = 0
        self._pending: deque[_Pending] = deque()
        self._work = ScoreWork()
        self._signal = 0
        self._left_out = torch.zeros((), device=device)
        self._waits: list[Stopwatch] = []
        self.record: RecordSpan = no_record
        """Names what this rank sends and waits for, while a trace is made."""

    def prepare(
        self, positions: torch.Tensor, replacements: torch.Tensor, *, is_heldout: bool
    ) -> None:
        """Has the targets of a micro-batch read, whose forward pass begins: arguments as of
        `loss`."""
        if self._fleet is not None:
            for rows in self._shares(len(positions)):
                self._fleet.prepare(_rows(positions[rows], replacements[rows], is_heldout))

    def loss(
        self,
        condition: torch.Tensor,
        positions: torch.Tensor,
        replacements: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        *,
        is_heldout: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends a condition, and returns (a loss whose backward awaits the gradient, the pair [sum
        of losses, images]).

        Both hold zero for the loss until the answer came, which may also take images off the count:
        those whose targets are bad (`left_out`). condition: [b, c, d]; positions,
        replacements: int64 [b], on the host; scale: the optimizer's loss scale; dtype: of the
        U-Net, sent in.
        """
        wants_gradient = torch.is_grad_enabled()
        kind = Kind.GRADIENT if wants_gradient else Kind.LOSS
        number, split = self._number % self._num_microbatches, self._shares(len(condition))
        self._number += 1
        request_numbers = []
        for rows in split if self._fleet is not None else ():
            about = _rows(positions[rows], replacements[rows], is_heldout)
            with self.record(SEND, micro_batch=number, sample=positions[rows]):
                request_numbers.append(
                    self._submit(kind, about, condition[rows].detach().to(dtype), scale)
                )
        reported = torch.zeros(2, device=condition.device)
        reported[1:].fill_(len(condition))
        requests = number, split, request_numbers
        pending = _Pending(self, *requests, positions, condition.shape, wants_gradient, reported)
        self._pending.append(pending)
        if not wants_gradient:
            if len(self._pending) > _MOST_IN_FLIGHT:
                self._pending[0].wait()
            return reported.new_zeros(()), reported
        return _AwaitGradient.apply(condition, pending), reported

    def generate(
        self, condition: torch.Tensor, positions: torch.Tensor, size: int
    ) -> torch.Tensor | None:
        """Images [n, 3, size, size] in [-1, 1], drawn by a score rank; for tensor rank 0 alone.
        None: no score rank is left, the run is about to be stopped.

        Args:
            condition: [n + 1, c, d] in the dtype of the U-Net, its last row the null condition.
            positions: of the prompts [n], on the host.
        """
        assert self._fleet is not None
        about = _rows(positions, torch.zeros_like(positions), is_heldout=True)
        one = torch.ones((), device=condition.device)
        answer = self._fleet.take(self._submit(Kind.IMAGES, about, condition.detach(), one, size))
        if answer is None:
            self._pass_on(_GIVEN_UP)
            return None
        pixels = upload(answer.payload, condition.device)
        return pixels.view(len(positions), 3, size, size)

    def left_out(self) -> torch.Tensor:
        """Images of the global batch that counted at first, but whose targets are bad; scalar. Ask
        after the backward passes and before `drain`."""
        return self._left_out

    def drain(self) -> None:
        """Returns when all answers are here, or on their way into this rank's stream."""
        while self._pending:
            self._pending[0].wait()
        self._number = 0
        self._left_out = torch.zeros_like(self._left_out)

    def pop_work(self) -> ScoreWork:
        """What happened since the last call; zeros on ranks that do not talk."""
        work, self._work = self._work, ScoreWork()
        # The last one first: when the device has passed it, it has passed the others.
        work.waited = sum(watch.seconds() for watch in reversed(self._waits))
        self._waits.clear()
        if self._fleet is not None:
            work.num_bytes = self._fleet.pop_bytes()
            work.ranks, work.queued, work.latency = self._fleet.state()
            self._fleet.publish_answered()
        return work

    def pass_on_signal(self) -> None:
        """A score rank's stop signal, as if this rank had got it: the ranks agree on it."""
        received, self._signal = self._signal, 0
        self._pass_on(received)

    def close(self, end: RunEnd) -> None:
        """Ends the service of the score ranks."""
        if self._fleet is not None:
            self._fleet.close(end)

    def _pass_on(self, received: int) -> None:
        if received in STOP_SIGNALS:
            signal.raise_signal(received)

    def _submit(
        self,
        kind: Kind,
        rows: Rows,
        condition: torch.Tensor,
        scale: torch.Tensor,
        image_size: int = 0,
    ) -> int:
        assert self._fleet is not None
        download = Download(condition, scale.float())
        condition_copy, scale_copy = download.tensors
        request = ScoreRequest(kind, rows, condition_copy, scale_copy, image_size)
        return self._fleet.submit(request, download.has_arrived)

    def _shares(self, num_rows: int) -> list[slice]:
        """The rows of a micro-batch as they are asked for."""
        ranks = self._num_score_ranks
        if self._num_microbatches >= ranks:
            return [slice(0, num_rows)]
        shares = [row_share(num_rows, index, ranks) for index in range(ranks)]
        return [rows for rows in shares if rows.start < rows.stop]

    def _receive(self, pending: _Pending) -> torch.Tensor:
        """The answers to a request, on all tensor ranks: fp32 [_HEAD + values]."""
        if self._pending.popleft() is not pending:
            raise RuntimeError("answers of score ranks are awaited in another order than asked for")
        device, width = pending.reported.device, pending.values_per_row
        if self._fleet is None:
            message = torch.zeros(_HEAD + pending.num_rows * width, device=device)
        else:
            watch = Stopwatch(device)
            watch.start()
            host = torch.zeros(_HEAD + pending.num_rows * width)
            for rows, number in zip(pending.split, pending.request_numbers, strict=True):
                about = {"micro_batch": pending.number, "sample": pending.positions[rows]}
                with self.record(WAIT, **about):
                    answer = self._fleet.take(number)
                self._count(answer)
                if answer is not None:
                    host[:_HEAD] += torch.tensor([answer.loss, float(answer.bad_samples)])
                    part = slice(_HEAD + rows.start * width, _HEAD + rows.stop * width)
                    host[part] = answer.payload
            message = upload(host, device)
            watch.stop()
            self._waits.append(watch)
        if self._tp_group.size() > 1:
            source = torch.distributed.get_global_rank(self._tp_group, 0)
            torch.distributed.broadcast(message, source, group=self._tp_group)
        self._left_out = self._left_out + message[1]
        return message

    def _count(self, answer: Answer | None) -> None:
        if answer is None:
            self._work.unanswered += 1
            self._signal = _GIVEN_UP
            return
        self._signal = max(self._signal, answer.signal)
        self._work.idle += answer.idle
        self._work.bad_samples += answer.bad_samples


def _rows(positions: torch.Tensor, replacements: torch.Tensor, is_heldout: bool) -> Rows:
    return Rows(tuple(positions.tolist()), tuple(replacements.tolist()), is_heldout)


class _Pending:
    """A condition that was sent and whose answer is awaited."""

    def __init__(
        self,
        score: RemoteScore,
        number: int,
        split: list[slice],
        request_numbers: list[int],
        positions: torch.Tensor,
        shape: torch.Size,
        wants_gradient: bool,
        reported: torch.Tensor,
    ) -> None:
        self._score, self._shape = score, shape
        self.number, self.split, self.positions = number, split, positions
        self.request_numbers = request_numbers
        self.reported = reported
        self.num_rows = shape[0]
        self.values_per_row = shape[1:].numel() if wants_gradient else 0

    def wait(self) -> torch.Tensor:
        """The gradient by the condition, fp32, of the loss without its scale; none for a LOSS."""
        message = self._score._receive(self)
        self.reported += torch.stack([message[0], -message[1]])
        return message[_HEAD:]

    def gradient(self) -> torch.Tensor:
        """The awaited gradient, in the condition's shape."""
        return self.wait().view(self._shape)


class _AwaitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, condition: torch.Tensor, pending: _Pending) -> torch.Tensor:
        ctx.pending, ctx.dtype = pending, condition.dtype
        return torch.zeros((), device=condition.device)

    @staticmethod
    def backward(ctx, scale: torch.Tensor):
        return (ctx.pending.gradient() * scale).to(ctx.dtype), None
