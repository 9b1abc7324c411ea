"""The page of a run: what happened to the widths, and why, from the files of the run alone."""
