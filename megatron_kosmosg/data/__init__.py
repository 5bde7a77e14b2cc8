"""Stored samples -> batches: a stream that is a pure function of (seed, stage, position)."""
