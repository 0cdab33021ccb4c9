"""Keep track of all requests: who asked for what, and how far each one is."""
