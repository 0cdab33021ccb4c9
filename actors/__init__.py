"""Run components in processes. Of this project, the package imports only `transport`."""
