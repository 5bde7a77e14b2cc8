"""The samplers that `--scheduler` offers, built on the model's own noise schedule."""

from __future__ import annotations

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

SAVED = "saved"
SCHEDULERS = {
    "dpm++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
}


def noise_scheduler(name: str, saved: SchedulerMixin) -> SchedulerMixin:
    """The named sampler with the settings of `saved` that it knows; "saved" is that one itself."""
    return saved if name == SAVED else SCHEDULERS[name].from_config(saved.config)
