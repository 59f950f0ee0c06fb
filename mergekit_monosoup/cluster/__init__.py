"""Work on many machines: a Ray cluster, and workers on it that are asked by name."""
