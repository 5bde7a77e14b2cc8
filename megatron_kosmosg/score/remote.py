"""The decoder's end of the score link: a condition is sent at once, its answer awaited later.

In training the answer is awaited in backward, so that forward passes run ahead of the U-Net;
without gradients, when the pass over the global batch ends. Tensor rank 0 talks, the others get
what it got. Whole micro-batches go to the score ranks in turn; rows are split where there are fewer
micro-batches than ranks.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_kosmosg.data.balance import share
from megatron_kosmosg.monitoring.signals import STOP_SIGNALS
from megatron_kosmosg.monitoring.spans import SEND, WAIT, Record, no_record
from megatron_kosmosg.monitoring.stopwatch import Stopwatch
from megatron_kosmosg.score.link import MOST_IN_FLIGHT, Link
from megatron_kosmosg.score.messages import HEAD, Kind, Request, read_answer


@dataclass
class ScoreWork:
    """What passed over the links since the last count."""

    waited: float = 0.0
    """Seconds that this decoder rank waited for answers."""
    idle: float = 0.0
    """Seconds that the score ranks waited for requests, summed over them."""
    num_bytes: int = 0


class RemoteScore:
    """The score ranks as a rank of the last pipeline stage sees them."""

    def __init__(
        self,
        links: Sequence[Link],
        num_score_ranks: int,
        num_microbatches: int,
        tp_group: ProcessGroup,
        device: torch.device,
    ) -> None:
        """links: on tensor rank 0. num_score_ranks: of this replica. num_microbatches: of one
        global batch."""
        self._links, self._num_score_ranks = tuple(links), num_score_ranks
        self._num_microbatches, self._tp_group = num_microbatches, tp_group
        self._number = 0
        self._pending: deque[_Pending] = deque()
        self._sums = torch.zeros(2, device=device)
        """Undecodable targets, seconds that score ranks were idle."""
        self._left_out = torch.zeros((), device=device)
        self._signal = torch.zeros((), device=device)
        self._waits: list[Stopwatch] = []
        self.record: Record = no_record
        """Names what this rank sends and waits for, while a trace is made."""

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
        """(a loss whose backward awaits the gradient, the pair [sum of losses, images]).

        Both hold zero for the loss until the answer came, which may also take images off the count:
        those whose targets are bad (`left_out`). condition: [b, c, d]; positions,
        replacements: int64 [b]; scale: the optimizer's loss scale; dtype: of the U-Net, sent in.
        """
        wants_gradient = torch.is_grad_enabled()
        kind = Kind.GRADIENT if wants_gradient else Kind.LOSS
        number, split = self._split(len(condition))
        for index, rows in split:
            if self._links:
                request = Request(
                    kind,
                    condition[rows].detach().to(dtype),
                    scale,
                    positions[rows],
                    replacements[rows],
                    is_heldout=is_heldout,
                )
                with self.record(SEND, micro_batch=number, sample=request.positions):
                    self._links[index].ask(request)
        reported = torch.zeros(2, device=condition.device)
        reported[1:].fill_(len(condition))
        pending = _Pending(
            self, number, split, positions, condition.shape, wants_gradient, reported
        )
        self._pending.append(pending)
        if not wants_gradient:
            if len(self._pending) > MOST_IN_FLIGHT // 2:
                self._pending[0].wait()
            return reported.new_zeros(()), reported
        return _AwaitGradient.apply(condition, pending), reported

    def draw(self, condition: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
        """Pictures [n, 3, size, size] in [-1, 1], drawn by a score rank; for tensor rank 0 alone.

        condition: [n + 1, c, d] in the dtype of the U-Net, its last row the null condition;
        positions: of the prompts [n].
        """
        one = torch.ones((), device=condition.device)
        none = torch.zeros_like(positions)
        request = Request(Kind.PICTURES, condition, one, positions, none, image_size=size)
        self._links[0].ask(request)
        pixels = self._links[0].take_answer(len(positions) * 3 * size * size)[HEAD:]
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
        """What happened since the last call, as far as the host knows; zeros on ranks that do not
        talk."""
        # The last one first: when the device has passed it, it has passed the others.
        work = ScoreWork(sum(watch.seconds() for watch in reversed(self._waits)))
        for link in self._links:
            work.num_bytes += link.num_bytes
            link.num_bytes = 0
        self._waits.clear()
        return work

    def pop_answers(self) -> torch.Tensor:
        """What the device knows of the same time, fp32 [3]: targets that could not be decoded,
        seconds that score ranks were idle, and the number for `pass_on`."""
        answers = torch.cat([self._sums, self._signal[None]])
        self._sums, self._signal = torch.zeros_like(self._sums), torch.zeros_like(self._signal)
        return answers

    def pass_on(self, received: int) -> None:
        """A score rank's stop signal, as if this rank had got it: the ranks agree on it."""
        if received in STOP_SIGNALS:
            signal.raise_signal(received)

    def close(self, *, is_done: bool) -> None:
        """Ends the score ranks' service. is_done: the run reached its last iteration."""
        for link in self._links:
            none, one = torch.zeros(0, dtype=torch.int64), torch.ones(())
            link.ask(Request(Kind.END, torch.zeros(0), one, none, none, is_done=is_done))
            link.finish()

    def _split(self, num_rows: int) -> tuple[int, list[tuple[int, slice]]]:
        """Number of the next micro-batch, and which score rank gets which of its rows."""
        number, ranks = self._number % self._num_microbatches, self._num_score_ranks
        self._number += 1
        if self._num_microbatches >= ranks:
            return number, [(number % ranks, slice(0, num_rows))]
        shares = [(index, share(num_rows, index, ranks)) for index in range(ranks)]
        return number, [(index, rows) for index, rows in shares if rows.start < rows.stop]

    def _receive(self, pending: _Pending) -> torch.Tensor:
        """fp32 [HEAD + values]: the answers to a request, on all tensor ranks."""
        if self._pending.popleft() is not pending:
            raise RuntimeError("answers of score ranks are awaited in another order than asked for")
        width = pending.values_per_row
        message = torch.zeros(HEAD + pending.num_rows * width, device=pending.reported.device)
        if self._links:
            watch = Stopwatch(message.device)
            watch.start()
            for index, rows in pending.split:
                about = {"micro_batch": pending.number, "sample": pending.positions[rows]}
                with self.record(WAIT, **about):
                    answer = self._links[index].take_answer((rows.stop - rows.start) * width)
                self._signal = torch.maximum(self._signal, read_answer(answer).signal)
                message[:HEAD] += answer[:HEAD]
                message[HEAD + rows.start * width : HEAD + rows.stop * width] = answer[HEAD:]
            watch.stop()
            self._waits.append(watch)
            summed = read_answer(message)
            self._sums += torch.stack([summed.bad_samples, summed.idle])
        if self._tp_group.size() > 1:
            source = torch.distributed.get_global_rank(self._tp_group, 0)
            torch.distributed.broadcast(message, source, group=self._tp_group)
        self._left_out = self._left_out + read_answer(message).bad_samples
        return message


class _Pending:
    """A condition whose answer is under way."""

    def __init__(
        self,
        score: RemoteScore,
        number: int,
        split: list[tuple[int, slice]],
        positions: torch.Tensor,
        shape: torch.Size,
        wants_gradient: bool,
        reported: torch.Tensor,
    ) -> None:
        self._score, self._shape = score, shape
        self.number, self.split, self.positions = number, split, positions
        self.reported = reported
        self.num_rows = shape[0]
        self.values_per_row = shape[1:].numel() if wants_gradient else 0

    def wait(self) -> torch.Tensor:
        """The gradient by the condition, fp32, of the loss without its scale; none for a LOSS."""
        message = self._score._receive(self)
        answer = read_answer(message)
        self.reported += torch.stack([answer.loss, -answer.bad_samples])
        return message[HEAD:]

    def gradient(self) -> torch.Tensor:
        """The same in the condition's shape."""
        return self.wait().view(self._shape)


class _AwaitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, condition: torch.Tensor, pending: _Pending) -> torch.Tensor:
        ctx.pending, ctx.dtype = pending, condition.dtype
        return torch.zeros((), device=condition.device)

    @staticmethod
    def backward(ctx, scale: torch.Tensor):
        return (ctx.pending.gradient() * scale).to(ctx.dtype), None
