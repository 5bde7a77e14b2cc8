"""Checkpoints of a run: saving, finding, resuming, damage, weights alone, what may differ."""
