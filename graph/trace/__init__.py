"""Show what happened in a run."""
