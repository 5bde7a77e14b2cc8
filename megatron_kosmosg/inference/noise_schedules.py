"""The samplers that `--scheduler` offers, built on the model's own noise schedule."""

from __future__ import annotations

from typing import Any

SAVED = "saved"
SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""Classes of diffusers, which takes seconds to import."""


def noise_scheduler(name: str, saved: Any) -> Any:
    """The named sampler with the settings of `saved` that it knows; "saved" is that one itself."""
    if name == SAVED:
        return saved
    import diffusers

    return getattr(diffusers, SCHEDULERS[name]).from_config(saved.config)
