"""Replay recorded steps, and find where two runs first differ."""
