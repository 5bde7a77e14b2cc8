"""Raw files -> sample store: a reader per input format, a converter per kind, one writer."""
