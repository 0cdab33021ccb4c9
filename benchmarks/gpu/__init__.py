"""A decode step of llama layers on a GPU, in Triton: kernels, launches, a captured step, and its check."""
