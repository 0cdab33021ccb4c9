"""Decides what runs where."""
