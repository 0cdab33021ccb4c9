"""Start a graph and keep it running."""
