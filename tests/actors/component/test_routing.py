"""Route every token to the experts that it chose, and back to its position, for any choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranvier.actors.component.routing import gather, scatter
from ranvier.transport.format.header import Row


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=4), experts=st.integers(1, 5), seed=st.integers(0, 99))
def test_there_and_back(counts: list[int], experts: int, seed: int) -> None:
    """Return every token unchanged from experts that do nothing, if its weights add up to one.

    Each batch's rows count the tokens in that batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens, choices = sum(counts), min(2, experts)
    rows = tuple(Row(session, 1, 3, count) for session, count in enumerate(counts))
    hidden = torch.randn(tokens, 4, generator=generator)
    scores = torch.rand(tokens, experts, generator=generator)
    weight, index = scores.topk(choices)
    weight = weight / weight.sum(-1, keepdim=True)
    ports = [f"expert{number}" for number in range(experts)]
    routed = scatter(rows, hidden, index, ports)
    assert sum(batch[port].shape[0] for port, batch in routed.items()) == tokens * choices
    for port, batch in routed.items():
        assert [row[:3] for row in batch.rows] == [row[:3] for row in rows]
        assert sum(row.tokens for row in batch.rows) == batch[port].shape[0]
    back = gather(index, weight, {port: batch[port] for port, batch in routed.items()}, ports)
    assert torch.allclose(back, hidden, atol=1e-6)


def test_one_expert_chosen_twice_counts_twice() -> None:
    """Send a token once to an expert that it chose twice, and add up the two weights.

    An expert that the token did not choose has no influence on it."""
    rows, hidden, ports = (Row(1, 1, 0, 2),), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ["a", "b"]
    index, weight = torch.tensor([[0, 0], [1, 0]]), torch.tensor([[0.25, 0.5], [2.0, 1.0]])
    routed = scatter(rows, hidden, index, ports)
    assert [batch.rows[0].tokens for batch in routed.values()] == [2, 1]
    parts = {"a": routed["a"]["a"], "b": torch.full((1, 2), 10.0)}
    assert gather(index, weight, parts, ports).tolist() == [[0.75, 1.5], [23.0, 24.0]]


def test_what_cannot_be_routed() -> None:
    """Refuse indices out of range, indices of a wrong shape, and answers with a wrong number of tokens."""
    rows, hidden = (Row(1, 1, 0, 2),), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="expected indices from 0 to 1 for a, b, got 0 to 2"):
        scatter(rows, hidden, torch.tensor([[0], [2]]), ["a", "b"])
    with pytest.raises(ValueError, match=r"expected integers \[2, choices\], got torch.int64\[3, 1\]"):
        scatter(rows, hidden, torch.zeros(3, 1, dtype=torch.long), ["a", "b"])
    with pytest.raises(ValueError, match="expected indices from 0 to 1 for a, b, got -1 to 0"):
        gather(torch.tensor([[0], [-1]]), torch.ones(2, 1), {"a": hidden[:1], "b": hidden[:1]}, ["a", "b"])
    with pytest.raises(ValueError, match="port b: expected 1 tokens, got 2"):
        gather(torch.tensor([[0], [1]]), torch.ones(2, 1), {"a": torch.zeros(1, 4), "b": torch.zeros(2, 4)}, ["a", "b"])
