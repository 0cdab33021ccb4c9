"""Show a run in a browser: its graph as it works, and why each token took as long as it did."""
