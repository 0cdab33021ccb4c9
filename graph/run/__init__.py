"""Brings a graph up and keeps it running."""
