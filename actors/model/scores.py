"""Score the tokens of a text: the log-probability of each, given all earlier ones, and the likeliest tokens in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from ranvier.transport.format.header import Row

from ..errors import NotFinite
from .sampling import log_probabilities

SCORED_AT_ONCE = 64
"""Tokens whose logits are computed at a time for scoring."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Make float32 logits [t, V] of hidden states [t, H]."""


def scored(
    row: Row, following: Sequence[int], hidden_tH: torch.Tensor, logits: Logits
) -> list[tuple[Row, torch.Tensor]]:
    """Return the log-probabilities of the tokens that follow those of a row, float32 [t]; none for the log's last token.

    Raises:
        NotFinite: one of them is not a number.
    """
    if not following:
        return []
    parts = _parts(following, hidden_tH, logits)
    scores_T = torch.cat(
        [-F.cross_entropy(logits_tV, torch.tensor(some), reduction="none") for some, logits_tV in parts]
    )
    if bool(scores_T.isnan().any()):
        raise NotFinite("scores", math.nan)
    return [(row._replace(tokens=len(following)), scores_T)]


def ranked(
    row: Row, following: Sequence[int], hidden_tH: torch.Tensor, logits: Logits, most: int
) -> list[tuple[Row, torch.Tensor]]:
    """Return the same as `log_probabilities` [1, pairs] for each token that follows, with the row of its place.

    Raises:
        NotFinite: a logit is not a number.
    """
    made: list[tuple[Row, torch.Tensor]] = []
    for some, logits_tV in _parts(following, hidden_tH, logits):
        if bool(logits_tV.isnan().any()):
            raise NotFinite("scores", math.nan)
        for token, logits_V in zip(some, logits_tV, strict=True):
            place = Row(row.session, row.epoch, row.position + len(made), 1)
            made.append((place, log_probabilities(logits_V, token, most)[None]))
    return made


def _parts(
    following: Sequence[int], hidden_tH: torch.Tensor, logits: Logits
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """Yield tokens with the logits in their places, a few at a time: logits are as wide as the vocabulary."""
    for start in range(0, len(following), SCORED_AT_ONCE):
        some = following[start : start + SCORED_AT_ONCE]
        yield some, logits(hidden_tH[start : start + len(some)])
