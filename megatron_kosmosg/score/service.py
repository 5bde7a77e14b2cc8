"""What a rank with the U-Net alone does all its life: condition in, loss and gradient out.

The replicas it serves take turns, one micro-batch each. It reads the target images of these
micro-batches itself, ahead of the conditions; the prompts stay on the decoder ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from megatron_kosmosg.config.batching import num_microbatches
from megatron_kosmosg.config.schema import RunConfig
from megatron_kosmosg.data.instruct_stream import InstructStream
from megatron_kosmosg.data.keyed import StreamName
from megatron_kosmosg.data.loader import MicroBatchIterator
from megatron_kosmosg.data.normalise import normalise, target_transform
from megatron_kosmosg.monitoring.signals import StopRequest
from megatron_kosmosg.monitoring.spans import IDLE, REPLY, UNET
from megatron_kosmosg.monitoring.stopwatch import Stopwatch
from megatron_kosmosg.parallel.transfers import pinned, upload
from megatron_kosmosg.score.connect import ScoreRank
from megatron_kosmosg.score.draws import Drawn, drawn_before
from megatron_kosmosg.score.messages import Answer, Kind, Request
from megatron_kosmosg.score.trace import ScoreTrace

Denoise = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str, Drawn | None], torch.Tensor]
"""Loss of each image by (conditions, targets, positions, noise key of their stream, noise where it
was drawn with the targets)."""
OpenStream = Callable[[str], InstructStream]
"""The stream of a split (train | heldout), reading targets."""
Draw = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Pictures [n, 3, size, size] of (condition with the null condition last, positions, size)."""


def serve(
    config: RunConfig,
    rank: ScoreRank,
    denoise: Denoise,
    draw: Draw,
    open_stream: OpenStream,
    dtype: torch.dtype,
) -> bool:
    """Answers until the decoder ranks end; True when their run is done, False when it was stopped.

    dtype: of the U-Net, in which conditions arrive.
    """
    readers = [
        _TargetReader(config, rank, replica, open_stream)
        for replica in range(rank.place.replica, rank.place.replica + len(rank.links))
    ]
    aligner = config.model.aligner
    shape = (aligner.num_queries, aligner.hidden_size)
    turns = list(zip(rank.links, readers, strict=True))
    is_done = True
    trace, watch = ScoreTrace(config, rank), Stopwatch(rank.device)
    with StopRequest() as stop:
        while turns:
            link, reader = turns.pop(0)
            watch.start()
            with trace.record(IDLE):
                request = link.take_request(shape, dtype)
            watch.stop()
            trace.received(request)
            # The stream's time: the program also waits for the U-Net's work before the request.
            idle = torch.tensor(watch.seconds())
            if request.kind is Kind.END:
                link.finish()
                reader.close()
                is_done = is_done and request.is_done
                continue
            if request.kind is Kind.PICTURES:
                pixels = draw(request.condition, request.positions, request.image_size)
                none = torch.zeros(())
                link.reply(Answer(none, none, _number(stop), idle, pixels))
                turns.insert(0, (link, reader))  # one replica asks for them, out of turn
            else:
                with trace.record(UNET, sample=request.positions):
                    loss, bad_samples, gradient = _score(
                        request, reader, denoise, _noise_key(config, request)
                    )
                with trace.record(REPLY, sample=request.positions):
                    link.reply(Answer(loss, bad_samples, _number(stop), idle, gradient))
                turns.append((link, reader))
    return is_done


def _number(stop: StopRequest) -> torch.Tensor:
    """Of the stop signal that this rank got, 0 for none."""
    return torch.tensor(0 if stop.received is None else int(stop.received))


def _split(request: Request) -> str:
    return "heldout" if request.is_heldout else "train"


def _noise_key(config: RunConfig, request: Request) -> str:
    return StreamName(config.stage, _split(request)).noise_key


def _score(
    request: Request, reader: _TargetReader, denoise: Denoise, noise_key: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of losses, number of bad targets, gradient of the unscaled sum: fp32, flat)."""
    targets, weights, drawn = reader.targets(request)
    wants_gradient = request.kind is Kind.GRADIENT
    condition = request.condition.float().requires_grad_(wants_gradient)
    device, scale = condition.device, request.scale.float()
    with torch.set_grad_enabled(wants_gradient):
        about = request.positions, noise_key, drawn
        losses = denoise(condition, reader.on_device(targets), *about)
        loss = (losses * upload(weights, device)).sum()
    bad_samples = (weights == 0).sum()
    if not wants_gradient:
        return loss, bad_samples, torch.zeros(0, device=device)
    (gradient,) = torch.autograd.grad(loss * scale, condition)
    return loss, bad_samples, gradient / scale


@dataclass
class _Place:
    """Where a reader stands."""

    start: int
    """First stream position of the global batch that its next micro-batch is of."""
    left: int
    """Its micro-batches of that global batch still to come."""


class _TargetReader:
    """Targets of the micro-batches of one replica that come to this rank."""

    def __init__(
        self, config: RunConfig, rank: ScoreRank, replica: int, open_stream: OpenStream
    ) -> None:
        self._config, self._rank, self._replica = config, rank, replica
        self._open_stream = open_stream
        self._streams: dict[str, InstructStream] = {}
        self._loaders: dict[str, MicroBatchIterator] = {}
        self._places: dict[str, _Place] = {}
        total, parts = (
            num_microbatches(config, rank.world.num_replicas),
            rank.world.score_ranks_per_unit,
        )
        index = rank.place.score_index
        self._per_global_batch = len(range(index, total, parts)) if total >= parts else total

    def targets(self, request: Request) -> tuple[torch.Tensor, torch.Tensor, Drawn | None]:
        """(targets of the request's rows, their weights in the sum of losses, their noise)."""
        split = _split(request)
        batch = self._next(split, int(request.positions.min()))
        if not torch.equal(batch["stream_positions"], request.positions):
            raise RuntimeError(
                f"score rank {self._rank.place} read the targets of stream positions "
                f"{batch['stream_positions'].tolist()}, the condition is of "
                f"{request.positions.tolist()}"
            )
        cached = "target_moments" in batch
        key = "target_moments" if cached else "target_pixel_values"
        targets, weights = batch[key], batch["target_weights"]
        # Where a prompt picture was bad, which is not read here, another sample took the place.
        replaced = batch["replacements"] != request.replacements
        for row in replaced.nonzero().flatten().tolist():
            position, replacement = int(request.positions[row]), int(request.replacements[row])
            stream = self._streams[split]
            other = stream.collate([stream[position]], 0, [replacement])
            targets[row], weights[row] = other[key][0], other["target_weights"][0]
        drawn = drawn_before(batch)
        if drawn is not None:
            drawn = {name: upload(values, self._rank.device) for name, values in drawn.items()}
        return targets, weights, drawn

    def on_device(self, targets: torch.Tensor) -> torch.Tensor:
        """The targets as the VAE takes them, or their moments."""
        targets = upload(targets, self._rank.device)
        if targets.dtype is not torch.uint8:
            return targets
        return normalise(targets, target_transform(self._config))

    def close(self) -> None:
        """Ends reading ahead."""
        for loader in self._loaders.values():
            loader.close(wait=False)

    def _next(self, split: str, position: int) -> dict[str, torch.Tensor]:
        size = self._config.training.global_batch_size
        start = position // size * size
        if split not in self._places or self._places[split].start != start:
            # The first request, or an evaluation that begins again.
            self._open(split, start)
        place = self._places[split]
        place.left -= 1
        if place.left == 0:
            place.start, place.left = start + size, self._per_global_batch
        return next(self._loaders[split])

    def _open(self, split: str, start: int) -> None:
        config, rank = self._config, self._rank
        if split in self._loaders:
            self._loaders[split].close(wait=False)
        if split not in self._streams:
            self._streams[split] = self._open_stream(split)
        self._loaders[split] = MicroBatchIterator(
            self._streams[split],
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=self._replica,
            dp_size=rank.world.num_replicas,
            start_sample=start,
            num_workers=config.data.num_workers,
            balance_tokens=config.data.balance_tokens,
            part=rank.place.score_index,
            num_parts=rank.world.score_ranks_per_unit,
            finish=partial(pinned, device=rank.device),
        )
        self._places[split] = _Place(start, self._per_global_batch)
