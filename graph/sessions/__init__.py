"""Keeps track of who asked for what, and how far it is."""
