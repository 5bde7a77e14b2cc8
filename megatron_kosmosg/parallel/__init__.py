"""Ranks, devices and process groups: the only place that touches Megatron's parallel_state."""

import warnings

# What Megatron-Core says when it is imported without apex and TransformerEngine, on every rank;
# platform.py reports which of them are in use. And torch's new names for collectives, which the
# oldest torch we support does not have.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script_method.*")
warnings.filterwarnings("ignore", message=r".*(all_gather_into|reduce_scatter)_tensor.*deprecated")
