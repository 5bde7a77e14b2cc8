"""Ranks, devices and process groups: the only place that touches Megatron's parallel_state."""
