"""How a tensor is written into bytes."""
