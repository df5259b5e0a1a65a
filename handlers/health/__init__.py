"""Statistics of representations, and rules that name what is wrong with a run."""
