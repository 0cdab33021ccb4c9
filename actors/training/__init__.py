"""Training across actors: gradients come back along the edges that activations went."""
