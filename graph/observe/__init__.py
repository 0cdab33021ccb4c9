"""Observe a running graph: its state, why it waits, and what other tools are told about it."""
