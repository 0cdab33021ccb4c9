"""Train a graph across actors: gradients return along the edges that carried the activations."""
