"""The frozen part of the image tower for the next micro-batch, computed before a wait.

With score ranks, a decoder rank waits for gradients. The frozen blocks depend on the images alone,
so their turn may come then, also across an update; whoever waits has put it on the device before.
That is before every wait, whether the answer is there or not: the work is the same later, and
tensor ranks, which read a batch together, do not know what the one that asked has got.
"""

from __future__ import annotations

from typing import cast

from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_attr_wrapped_model

from megatron_kosmosg.models.vision_encoder import VisionEncoder
from megatron_kosmosg.monitoring.spans import AHEAD
from megatron_kosmosg.training.batches import BatchFeed


def encode_images_ahead(feed: BatchFeed, chunks: list[DistributedDataParallel]) -> None:
    """Computes it for the batch that `feed` gives next, unless that is done already; nothing where
    this rank has no image tower, none of its blocks is frozen, or no batch is to come."""
    encoder = cast(VisionEncoder | None, get_attr_wrapped_model(chunks[0], "vision_encoder"))
    if encoder is None or not encoder.frozen_blocks():
        return
    batch = feed.peek()
    if batch is None or not len(images := batch["pixel_values"]) or encoder.has_begun(images):
        return
    timers = chunks[0].config.timers
    if timers is not None:
        timers(AHEAD, log_level=2).start()
    batch["pixel_values"] = encoder.begin(images)
    if timers is not None:
        timers(AHEAD).stop()
