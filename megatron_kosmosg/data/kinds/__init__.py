"""One file for each kind of sample that a store may hold."""
