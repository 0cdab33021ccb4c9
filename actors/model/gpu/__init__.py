"""Compute decode steps of native layers on a GPU with Triton kernels, one CUDA graph per step."""
