"""The graph file, the plan, the run, and what a user sees of it. Imports transport and actors."""
