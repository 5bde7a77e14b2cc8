"""All random-number state of this rank, so that a resumed run draws what the interrupted one would.

Covers torch, the accelerator, numpy, Python, and Megatron-Core's tensor-parallel streams.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from megatron_kosmosg.parallel.devices import device_rng_state, set_device_rng_state
from megatron_kosmosg.parallel.seeds import rng_tracker

OTHER_DEVICE = "saved on another kind of device: dropout masks differ from an unbroken run"


def rng_state() -> dict[str, Any]:
    """Plain values and CPU tensors that `restore_rng_state` takes back."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "device": device_rng_state(),
        "tracker": {name: state.clone() for name, state in rng_tracker().get_states().items()},
    }


def fits_this_device(state: dict[str, Any]) -> bool:
    """Whether a `rng_state` is one of this kind of device: a generator of the CPU cannot take the
    state of a GPU's, nor the other way round."""
    return (state["device"] is None) == (device_rng_state() is None)


def restore_rng_state(state: dict[str, Any]) -> None:
    """Puts every random generator of this rank back to `state`, as `rng_state` gave it."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        set_device_rng_state(state["device"])
    rng_tracker().set_states({name: value.clone() for name, value in state["tracker"].items()})
