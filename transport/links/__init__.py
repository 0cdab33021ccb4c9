"""Implement what an edge guarantees: order, credit and acknowledgement."""
