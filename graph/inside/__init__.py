"""Read and change what is inside a running model."""
