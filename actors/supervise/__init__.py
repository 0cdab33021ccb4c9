"""Starts, watches and restarts processes."""
