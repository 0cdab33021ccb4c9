"""Route each token of a step to some of an actor's outputs, and combine the results by their weights.

A router's output to one expert is a `Batch` with the rows of its input. Each row counts only the tokens that go to this
expert, possibly 0. So every expert, and the combiner that waits for all of them, sees every step. Custom actors may use this
module, too.

Shape suffixes: T tokens, t tokens of one expert, E experts, k choices per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ranvier.transport.format.header import Row

from .actor import Batch


def scatter(
    rows: tuple[Row, ...], hidden_TH: torch.Tensor, index_Tk: torch.Tensor, ports: Sequence[str]
) -> dict[str, Batch]:
    """Return the batch for each port: the tokens that have the port's number among their choices, in their order.

    Raises:
        ValueError: an index is out of range or not an integer, or there is not one row of choices per token.
    """
    if index_Tk.dim() != 2 or index_Tk.shape[0] != hidden_TH.shape[0] or index_Tk.dtype.is_floating_point:
        raise ValueError(
            f"routing: expected integers [{hidden_TH.shape[0]}, choices], got {index_Tk.dtype}{list(index_Tk.shape)}"
        )
    _check_range(index_Tk, ports)
    routed = {}
    counts = [row.tokens for row in rows]
    for number, port in enumerate(ports):
        chosen_T = (index_Tk == number).any(1)
        own = tuple(
            row._replace(tokens=int(part.sum())) for row, part in zip(rows, torch.split(chosen_T, counts), strict=True)
        )
        routed[port] = Batch(own, {port: hidden_TH[chosen_T]})
    return routed


def gather(
    index_Tk: torch.Tensor, weight_Tk: torch.Tensor, parts: Mapping[str, torch.Tensor], ports: Sequence[str]
) -> torch.Tensor:
    """Return [T, H]: for each token, the weighted sum of the results of its choices.

    Raises:
        ValueError: an index is out of range, or a part does not have as many tokens as were sent there.
    """
    _check_range(index_Tk, ports)
    first = parts[ports[0]]
    mixed_TH = torch.zeros(index_Tk.shape[0], first.shape[1], dtype=first.dtype, device=first.device)
    for number, port in enumerate(ports):
        chosen_Tk = index_Tk == number
        token_t = torch.where(chosen_Tk.any(1))[0]
        if len(token_t) != parts[port].shape[0]:
            raise ValueError(f"routing: port {port}: expected {len(token_t)} tokens, got {parts[port].shape[0]}")
        # if a token chooses a port twice, the port gets the token only once
        weight_t = torch.where(chosen_Tk, weight_Tk, 0.0).sum(1)[token_t]
        mixed_TH.index_add_(0, token_t, (parts[port] * weight_t[:, None]).to(mixed_TH.dtype))
    return mixed_TH


def balancing_loss(scores_TE: torch.Tensor, index_Tk: torch.Tensor) -> torch.Tensor:
    """Return how unevenly a router chooses, as a term to minimise: [].

    The term is E times the sum over the experts of (choices of the expert per token · mean score of the expert). It is k if
    all experts are used equally, and grows with the differences. Its gradient flows through the scores (Fedus et al. 2021,
    Switch Transformers, with k choices as transformers counts them).

    Args:
        scores_TE: the probabilities of all experts for each token.
        index_Tk: the chosen experts.
    """
    count = scores_TE.shape[1]
    chosen_E = torch.bincount(index_Tk.flatten(), minlength=count).to(scores_TE.dtype) / max(len(index_Tk), 1)
    return count * (chosen_E * scores_TE.mean(0)).sum()


def expert_ports(numbers: tuple[int, int]) -> list[str]:
    """Return the ports of the experts from `numbers[0]` to `numbers[1]`, both included."""
    return [f"expert{number}" for number in range(numbers[0], numbers[1] + 1)]


def _check_range(index_Tk: torch.Tensor, ports: Sequence[str]) -> None:
    if index_Tk.numel() and not 0 <= int(index_Tk.min()) <= int(index_Tk.max()) < len(ports):
        raise ValueError(
            f"routing: expected indices from 0 to {len(ports) - 1} for {', '.join(ports)}, "
            f"got {int(index_Tk.min())} to {int(index_Tk.max())}"
        )
