"""Numbers for images that a model drew: what an evaluator is, and the table of those there are."""
