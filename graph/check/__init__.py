"""Check that a graph file is right, before anything starts."""
