"""Define the last actor of an embedding: the mean of all tokens."""

import torch


class Mean(torch.nn.Module):
    """Return the mean of a text's hidden values, of length 1."""

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": torch.nn.functional.normalize(hidden.float().mean(0, keepdim=True), dim=-1)}
