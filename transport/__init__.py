"""Bytes and tensors between processes: messages, links, wires. Imports nothing else of this project."""
