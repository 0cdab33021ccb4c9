"""Read a graph file and check it."""
