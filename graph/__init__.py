"""Read, plan, run, train and inspect graphs. This package imports `transport` and `actors`."""
