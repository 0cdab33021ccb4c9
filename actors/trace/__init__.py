"""What is written down while actors run."""
