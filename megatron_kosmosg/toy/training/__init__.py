"""Trains the frozen parts that the toy world ships with (`toy/assets`)."""
