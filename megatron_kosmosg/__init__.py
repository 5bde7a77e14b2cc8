"""KOSMOS-G: training, conversion and inference on Megatron-Core and diffusers."""

from megatron_kosmosg.unusable_packages import hide_unusable_before_megatron

hide_unusable_before_megatron()
