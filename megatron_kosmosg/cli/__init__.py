"""Commands: one file each, with its options; `main(arguments)` returns the exit code."""
