"""A program reads the toy world's pictures and compares them with what the prompt asked for."""
