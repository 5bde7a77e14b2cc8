"""A program reads the toy world's images and compares them with what the prompt asked for."""
