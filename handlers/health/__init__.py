"""Statistics of features, and rules that name the problems of a run."""
