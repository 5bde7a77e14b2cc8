"""What a layout of a run holds, sends and takes on GPUs, by formulae alone; and the best layout."""
