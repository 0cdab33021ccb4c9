"""Reads a graph file and checks it."""
