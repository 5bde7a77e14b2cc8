"""The samplers that `--scheduler` offers, built on the model's own noise schedule."""

from __future__ import annotations

from typing import Any

from megatron_kosmosg.config.errors import ConfigError

SAVED = "saved"
SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""Classes of diffusers, which takes seconds to import."""


def noise_scheduler(name: str, saved: Any) -> Any:
    """The named sampler with the settings of `saved` that it knows; "saved" is that one itself.

    Raises ConfigError for a U-Net whose predictions the sampler cannot use.
    """
    if name == SAVED:
        return saved
    import diffusers

    if name == "pndm":
        if saved.config.prediction_type == "sample":
            raise ConfigError(
                "--scheduler pndm cannot use this U-Net, which predicts the clean image; "
                "take another one"
            )
        # As Stable Diffusion is configured; otherwise the first steps take several passes each.
        return diffusers.PNDMScheduler.from_config(saved.config, skip_prk_steps=True)
    return getattr(diffusers, SCHEDULERS[name]).from_config(saved.config)
