"""What a rank with the U-Net alone does all its life: condition in, loss and gradient out.

It reads the target images of a request itself, as soon as the request is announced, and encodes
them before the condition comes; the prompts stay on the decoder ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.random_keys import StreamName
from megatron_kosmosg.data.samples import Split
from megatron_kosmosg.monitoring.signals import StopRequest
from megatron_kosmosg.monitoring.spans import IDLE, REPLY, UNET
from megatron_kosmosg.monitoring.stopwatch import Stopwatch
from megatron_kosmosg.parallel.transfers import upload
from megatron_kosmosg.score.connect import ScoreRank
from megatron_kosmosg.score.keyed_noise import KeyedNoise
from megatron_kosmosg.score.member import DecoderLost, ReceivedRequest
from megatron_kosmosg.score.messages import Answer, Kind, ScoreRequest
from megatron_kosmosg.score.targets import Encode, OpenStream, TargetReader
from megatron_kosmosg.score.trace import ScoreTrace
from megatron_kosmosg.score.wire import RunEnd

Denoise = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str, KeyedNoise | None], torch.Tensor]
"""Loss of each image by (conditions, targets, positions, noise key of their stream, noise where it
was drawn with the targets)."""
GenerateImages = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Images [n, 3, size, size] of (condition with the null condition last, positions, size)."""
NO_PRINTS: Mapping[str, str] = MappingProxyType({})
_LOOK_SECONDS = 1.0
"""Between two looks whether a signal came, where nothing is asked."""


def serve(
    config: RunConfig,
    rank: ScoreRank,
    denoise: Denoise,
    generate: GenerateImages,
    open_stream: OpenStream,
    encode: Encode | None = None,
    prints: Mapping[str, str] = NO_PRINTS,
) -> bool:
    """Answers until the decoder ranks end; True when their run is done, False when it was stopped,
    or this rank, which is no rank of the run's job, was told to.

    Args:
        encode: encodes target images before their condition comes; None leaves that to `denoise`.
        prints: fingerprints of what this rank has loaded.
    """
    membership = rank.membership
    reader = TargetReader(config, rank.device, open_stream, encode)
    try:
        splits: list[Split] = ["train", *(["heldout"] if config.data.heldout else [])]
        data = {
            f"data of {split}, {name}": fingerprint
            for split in splits
            for name, fingerprint in reader.fingerprints(split).items()
        }
        reader.on_read, membership.prepare = membership.wake, reader.prepare
        trace = ScoreTrace(config, rank)
        work = _Work(config, rank.device, reader, denoise, generate)
        with StopRequest() as stop:
            membership.is_loaded({**prints, **data})
            while True:
                received, idle = _next(rank, reader, trace, stop)
                if received is None:
                    trace.ended()
                    if membership.end is RunEnd.FAILED:
                        raise DecoderLost("the decoder ranks ended because of a failure")
                    if membership.end is None:
                        membership.leave()
                    return membership.end is RunEnd.DONE
                trace.received(received.request)
                signal = 0
                # A guest's stop is its own end alone: training goes on without it.
                if stop.received is not None and rank.coordinates is not None:
                    signal = int(stop.received)
                about = {"sample": torch.tensor(received.request.rows.positions)}
                with trace.record(UNET, **about):
                    answer = work.answer(received.request, idle, signal)
                with trace.record(REPLY, **about):
                    membership.reply(received, answer)
    finally:
        reader.close()


def _next(
    rank: ScoreRank, reader: TargetReader, trace: ScoreTrace, stop: StopRequest
) -> tuple[ReceivedRequest | None, float]:
    """(the next request, seconds that were waited for it); (None, seconds) when the service is
    over."""
    idle, membership, watch = 0.0, rank.membership, Stopwatch(rank.device)
    is_guest = rank.coordinates is None
    while True:
        received = membership.take(0.0)
        if received is None and not reader.encode_ahead():
            watch.start()
            with trace.record(IDLE):
                received = membership.take(_LOOK_SECONDS)
            watch.stop()
            # The stream's time: the program also waits for the U-Net's work before the request.
            idle += watch.seconds()
        is_over = membership.end is not None or (is_guest and stop.received is not None)
        if received is not None or is_over:
            return received, idle


class _Work:
    """Computes the answers to requests."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        reader: TargetReader,
        denoise: Denoise,
        generate: GenerateImages,
    ) -> None:
        self._config, self._device, self._reader = config, device, reader
        self._denoise, self._generate = denoise, generate

    def answer(self, request: ScoreRequest, idle: float, signal: int) -> Answer:
        """The answer to a request. `idle` and `signal` are put into it besides."""
        started = time.perf_counter()
        condition = upload(request.condition, self._device)
        positions = torch.tensor(request.rows.positions)
        if request.kind is Kind.IMAGES:
            images = self._generate(condition, positions, request.image_size)
            loss, num_bad, payload = torch.zeros(()), 0, images
        else:
            loss, num_bad, payload = self._score(request, condition, positions)
        host = torch.cat([loss.detach().float().view(1), payload.flatten().float()]).cpu()
        seconds = time.perf_counter() - started
        return Answer(float(host[0]), num_bad, signal, idle, seconds, host[1:])

    def _score(
        self, request: ScoreRequest, condition: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, int, torch.Tensor]:
        """(sum of losses, number of bad targets, gradient of the unscaled sum in fp32)."""
        targets = self._reader.take(request.rows)
        wants_gradient = request.kind is Kind.GRADIENT
        condition = condition.float().requires_grad_(wants_gradient)
        stream = StreamName(self._config.stage, request.rows.split).noise_key
        with torch.set_grad_enabled(wants_gradient):
            losses = self._denoise(
                condition, targets.values, positions, stream, targets.keyed_noise
            )
            loss = (losses * upload(targets.weights, self._device)).sum()
        num_bad = int((targets.weights == 0).sum())
        if not wants_gradient:
            return loss, num_bad, torch.zeros(0, device=self._device)
        scale = upload(request.scale, self._device)
        (gradient,) = torch.autograd.grad(loss * scale, condition)
        return loss, num_bad, gradient / scale
