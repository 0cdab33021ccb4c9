"""Carry bytes and tensors between processes: messages, links and wires.

This package imports no other package of the project.
"""
