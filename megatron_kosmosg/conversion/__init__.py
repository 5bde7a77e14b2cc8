"""Checkpoints of other projects to ours, and ours to theirs: one name table for both ways."""
