"""Read a graph file."""
