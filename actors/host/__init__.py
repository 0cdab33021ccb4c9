"""Run one actor in its own process: receive, batch, step, send."""
