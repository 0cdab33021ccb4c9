"""Decide what runs where, and print that plan."""
