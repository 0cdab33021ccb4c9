"""Shows what happened in a run."""
