"""The former name of megatron_kosmosg.hf.modeling_kosmosg_aligner, for programs that import it."""

from __future__ import annotations

import sys
import warnings

from megatron_kosmosg.hf import modeling_kosmosg_aligner

warnings.warn(f"{__name__} is now {modeling_kosmosg_aligner.__name__}", FutureWarning, stacklevel=2)
sys.modules[__name__] = modeling_kosmosg_aligner
