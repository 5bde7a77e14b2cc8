"""The names that the package promises to its users, in the one place where tests import them."""

from __future__ import annotations

from megatron_kosmosg import KosmosGPipeline, SampleStore

__all__ = ["KosmosGPipeline", "SampleStore"]
