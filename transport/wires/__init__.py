"""Carry bytes to other processes."""
