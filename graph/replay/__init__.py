"""Repeats recorded steps, and finds where two runs first differ."""
