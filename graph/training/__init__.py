"""Train a graph: plan its schedule and links for gradients, read its data, and run it until all steps are done."""
