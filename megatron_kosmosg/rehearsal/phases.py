"""Names the phases of an update where they begin and end.

forward, backward: a micro-batch's, without those of the U-Net. exchange: between pipeline stages.
images ahead: the frozen part of a micro-batch's image tower, where it runs before a wait.
Everything else keeps the name that the caller gave.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import megatron.core.pipeline_parallel.schedules as schedules
import torch
from diffusers import UNet2DConditionModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_kosmosg.monitoring.spans import AHEAD
from megatron_kosmosg.rehearsal.recorder import Recorder
from megatron_kosmosg.training import images_ahead

FORWARD, BACKWARD, EXCHANGE = "forward", "backward", "exchange"
UNET_FORWARD, UNET_BACKWARD = "forward of the U-Net", "backward of the U-Net"
SERVE = "serve"
"""Of a score rank: everything around the U-Net's passes, from the condition to the answer."""


def name_phases(recorder: Recorder) -> None:
    """Has the phases named for the rest of the process; has to come before anything takes names out
    of Megatron-Core's schedules, or out of `images_ahead`."""
    schedules.forward_step = _named(recorder, FORWARD, schedules.forward_step)
    schedules.backward_step = _named(recorder, BACKWARD, schedules.backward_step)
    P2PCommunicator._communicate = _named(recorder, EXCHANGE, P2PCommunicator._communicate)
    images_ahead.encode_images_ahead = _named(recorder, AHEAD, images_ahead.encode_images_ahead)
    UNet2DConditionModel.forward = _watched(recorder, UNet2DConditionModel.forward)


def _named(recorder: Recorder, name: str, function: Callable) -> Callable:
    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        with recorder.phase(name):
            return function(*args, **named)

    return call


def _watched(recorder: Recorder, forward: Callable) -> Callable:
    """The U-Net's forward pass, whose backward begins at its output and ends at its condition."""

    @wraps(forward)
    def call(self, sample, timestep, encoder_hidden_states, *args: Any, **named: Any) -> Any:
        with recorder.phase(UNET_FORWARD):
            condition = encoder_hidden_states
            output = forward(self, sample, timestep, condition, *args, **named)
        if torch.is_grad_enabled() and condition.requires_grad:
            output.sample.register_hook(lambda _: recorder.enter(UNET_BACKWARD))
            condition.register_hook(lambda _: recorder.leave())
        return output

    return call
