"""Training a graph: what its file says of it, the links that gradients need, the data, and the loop around the run."""
