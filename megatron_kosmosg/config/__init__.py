"""Every setting of a run with its unit, how it is given, and what is refused. Imports no torch."""
