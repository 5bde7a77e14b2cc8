"""The former name of megatron_kosmosg.hf.pipeline_kosmosg, for programs that import it."""

from __future__ import annotations

import sys
import warnings

from megatron_kosmosg.hf import pipeline_kosmosg

warnings.warn(f"{__name__} is now {pipeline_kosmosg.__name__}", FutureWarning, stacklevel=2)
sys.modules[__name__] = pipeline_kosmosg
