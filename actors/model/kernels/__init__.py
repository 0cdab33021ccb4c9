"""Compute with packed weights in C: one file for each instruction set, and the Python around them."""
