"""Bring requests from a server's thread to a running graph, and keep what its streams have sent."""
