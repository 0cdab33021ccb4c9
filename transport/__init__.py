"""Carry bytes and tensors between processes: messages, links and wires.

This package imports nothing else of the project.
"""
