"""Modules that travel with exported folders: they import nothing of this package."""
