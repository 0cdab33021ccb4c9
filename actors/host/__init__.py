"""Run one actor in a process of its own: receive, batch, step, send."""
