"""Define the kind `head`, which makes logits and chooses tokens.

Shape suffixes: T tokens of the batch, t tokens of one row, R rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from ranvier.transport.format.header import Row

from ..component.actor import Actor, Batch, Context, Look, RowsFailed
from ..component.devices import here
from ..component.inside import LOGITS, Place
from ..component.session import SessionInfo
from ..errors import NotFinite
from . import weights
from .guide import GrammarError, Guide, Guides
from .inside import Inside
from .kernels import packed
from .kernels.packed import Packed
from .sampling import as_they_are, choose, likeliest, likeliest_of_each, log_probabilities, make_sure_of
from .scores import ranked, scored
from .tensors import Matrix, Norm, needed, product, read_matrix, read_slot

if TYPE_CHECKING:
    from .gpu.fused import Made

PIECE = 192
"""Columns whose products are summed in float32; the pieces are then summed in float64 (see `_in_pieces`)."""


class _Stream:
    """Hold a session's tokens so far; they depend only on the session's log, so a recovery rebuilds them."""

    def __init__(self, info: SessionInfo) -> None:
        self.info = info
        self.tokens = list(info.log)
        self.known = len(info.log)
        self.plain = as_they_are(info.sampling) and info.grammar is None
        self.needs_logits = not self.plain or info.logits or info.logprobs is not None
        self.guide: Guide | None = None


class Head(Actor):
    """Choose the next token of each session whose prompt is complete, from `hidden` [tokens, H].

    `token` int64 [rows] goes back to the embedding, unless the stream has ended; `sampled` int64 [rows] goes to the
    gateway. So do `logits` float32 [rows, V], `logprobs` float32 [rows, pairs of id and number] or `scores` float32
    [tokens] for sessions that asked for them.
    """

    writes = False
    places = True
    makes_new = True
    stateless = True
    look: Look | None = None
    _guides: Guides | None = None

    def __init__(self) -> None:
        self.inside = Inside([Place(LOGITS)])

    def allowed(self, due: list[Row], logits_RV: torch.Tensor) -> torch.Tensor:
        """Return the logits to choose tokens by, with -inf for tokens that may not be chosen."""
        return logits_RV

    def load(self, context: Context) -> None:
        self.load_with(context, None)
        context.progress(1.0)

    def load_with(self, context: Context, weight_VH: Matrix | None) -> None:
        """Load the weights; if `weight_VH` is given (a tied embedding's matrix), use it instead of reading one."""
        checkpoint, dtype = needed(context)
        config = checkpoint.config
        held = {slot.name: read_slot(slot, checkpoint, dtype, context.device) for slot in weights.final_norm(config)}
        self.norm = Norm(config, held["norm"], held.get("norm_bias"))
        self.held = sum(tensor.nbytes for tensor in held.values())
        if weight_VH is None:
            slot = next(slot for slot in weights.head(config) if slot.name == "head")
            self.weight_VH: Matrix = read_matrix(
                slot, checkpoint, dtype, context.precision, context.fast, context.device
            )
            self.held += self.weight_VH.nbytes
        else:
            self.weight_VH = weight_VH
        self._softcap = config.logit_softcap
        self.streams: dict[int, _Stream] = {}

    def open(self, session: SessionInfo) -> None:
        self.streams[session.session] = _Stream(session)
        self.inside.open(session)

    def close(self, session: int) -> None:
        self.streams.pop(session, None)
        self.inside.close(session)

    def step(self, batch: Batch) -> Mapping[str, torch.Tensor | Batch]:
        return self.inside.around(batch.rows, lambda: self.forward(batch.rows, batch["hidden"]))

    def scores(self, rows: tuple[Row, ...]) -> bool:
        """Return whether a row's session asks for scores."""
        return any(self.streams[row.session].info.score for row in rows)

    def forward(
        self, rows: tuple[Row, ...], hidden_TH: torch.Tensor, made: Made | None = None
    ) -> Mapping[str, torch.Tensor | Batch]:
        """Choose tokens and compute scores. `made` has the logits of all rows, of one token each, if they are known."""
        due, last, asked = [], [], []
        outputs: dict[str, torch.Tensor | Batch] = {}
        end = 0
        failures: dict[Row, Exception] = {}
        for row in rows:
            end += row.tokens
            for start, stop in self.inside.read_here(Place(LOGITS), row):
                read = Row(row.session, row.epoch, start, stop - start)
                at = end - row.tokens + start - row.position
                self.inside.touch(Place(LOGITS), (read,), self.logits(hidden_TH[at : at + read.tokens]))
            if self.streams[row.session].info.score:
                asked.append((row, hidden_TH[end - row.tokens : end]))
            elif row.position + row.tokens >= self.streams[row.session].known:  # otherwise the prompt continues
                due.append(row)
                last.append(end - 1)
        if due:
            if made is None or made.logits_TV is None or made.chosen is None:
                logits_RV, chosen = self.logits(hidden_TH if len(last) == hidden_TH.shape[0] else hidden_TH[last]), None
            else:
                logits_RV, chosen = made.logits_TV[last], [made.chosen[index] for index in last]
            if self.look is not None:
                self.look(None, "logits", tuple(last_of(row) for row in due), logits_RV)
            outputs |= self._sampled(due, logits_RV, failures, chosen)
        if asked:
            self._add_scores(asked, outputs, failures)
        if failures:
            raise RowsFailed(outputs, failures)
        return outputs

    def _add_scores(
        self, rows: list[tuple[Row, torch.Tensor]], outputs: dict[str, torch.Tensor | Batch], failures: dict[Row, Exception]
    ) -> None:  # fmt: skip
        """Add the scores of rows, given with their `hidden` [t, H], to the outputs, and errors to `failures`."""

        def logits(hidden_tH: torch.Tensor) -> torch.Tensor:
            return here(self.logits(hidden_tH))

        made: dict[str, list[tuple[Row, torch.Tensor]]] = {"scores": [], "logprobs": []}
        for row, hidden_tH in rows:
            stream = self.streams[row.session]
            most, following = stream.info.logprobs, stream.tokens[row.position + 1 : row.position + row.tokens + 1]
            try:
                if most is None:
                    made["scores"] += scored(row, following, hidden_tH, logits)
                else:
                    made["logprobs"] += ranked(row, following, hidden_tH, logits, most)
            except NotFinite as error:
                failures[row] = error
        for port, parts in made.items():
            if parts:
                own = Batch(tuple(row for row, _ in parts), {port: torch.cat([numbers for _, numbers in parts])})
                beside = outputs.get(port)
                if isinstance(beside, Batch):  # of tokens that were chosen in this step
                    own = Batch(beside.rows + own.rows, {port: torch.cat([beside[port], own[port]])})
                outputs[port] = own

    def logits(self, picked_TH: torch.Tensor) -> torch.Tensor:
        """Return the logits of some tokens, float32 [T, V]."""
        if isinstance(self.weight_VH, Packed):  # in float32 throughout
            logits_TV = self.norm.before(self.weight_VH, picked_TH)
        elif picked_TH.dtype is torch.float32 and isinstance(self.weight_VH, torch.Tensor):
            logits_TV = _in_pieces(self.norm(picked_TH), self.weight_VH)
        else:
            logits_TV = product(self.norm(picked_TH), self.weight_VH).float()
        if self._softcap is not None:
            logits_TV = torch.tanh(logits_TV / self._softcap) * self._softcap
        return logits_TV

    def _sampled(
        self, due: list[Row], logits_RV: torch.Tensor, failures: dict[Row, Exception], chosen: list[int] | None
    ) -> Mapping[str, torch.Tensor | Batch]:
        """Choose a token for each row, and add the errors of rows without finite logits to `failures`.

        On a GPU the likeliest tokens are found there. The logits, half a megabyte per row, come back only if a row needs them.
        """
        allowed_RV = self.allowed(due, logits_RV).float().contiguous()  # as `likeliest` reads them
        on_gpu = not allowed_RV.is_cpu or chosen is not None
        if on_gpu and any(self.streams[row.session].needs_logits for row in due):
            logits_RV, allowed_RV, chosen = here(logits_RV), here(allowed_RV), None
        if chosen is None and any(self.streams[row.session].plain for row in due):
            chosen = likeliest_of_each(allowed_RV)
        drawn: list[_Drawn] = []
        for index, row in enumerate(due):
            try:
                drawn.append(self._draw(row, allowed_RV, index, None if chosen is None else chosen[index]))
            except (NotFinite, GrammarError) as error:
                failures[row] = error
        return _outputs(drawn, logits_RV) if drawn else {}

    def _draw(self, row: Row, allowed_RV: torch.Tensor, index: int, chosen: int | None) -> _Drawn:
        stream = self.streams[row.session]
        info, position = stream.info, row.position + row.tokens
        del stream.tokens[position:]  # by position: repeating a step changes nothing
        if chosen is not None and stream.plain:
            token = make_sure_of(chosen, allowed_RV, index)
        else:
            token = self._chosen(stream, position, allowed_RV, index)
        stream.tokens.append(token)
        goes_on = not info.finished(len(stream.tokens) - stream.known, token)
        return _Drawn(Row(row.session, row.epoch, position, 1), token, goes_on, info, index)

    def _chosen(self, stream: _Stream, position: int, allowed_RV: torch.Tensor, index: int) -> int:
        """Choose a token that a grammar allows, or that sampling, penalties or biases lead to."""
        info, tokens, allowed_V = stream.info, stream.tokens, allowed_RV[index]
        if info.grammar is not None:
            self._guides = self._guides or Guides(allowed_RV.shape[1])
            stream.guide = stream.guide or self._guides.of(info.grammar, info.stop_tokens)
            answer = tokens[info.prompt_tokens :]
            if packed.library() is not None and as_they_are(info.sampling):
                return likeliest(allowed_RV, index, stream.guide.allowed(answer))
            allowed_V = stream.guide.masked(allowed_V, answer)
        return choose(allowed_V, info.sampling, position, tokens, info.prompt_tokens, info.stop_tokens)

    def held_bytes(self) -> int:
        return self.held


class _Drawn(NamedTuple):
    """Hold the token that was chosen for a row, and which of the logits it was chosen from."""

    row: Row
    token: int
    goes_on: bool
    info: SessionInfo
    place: int


def _outputs(drawn: list[_Drawn], logits_RV: torch.Tensor) -> Mapping[str, torch.Tensor | Batch]:
    """Return the outputs of a head for the tokens that it has chosen."""
    outputs: dict[str, torch.Tensor | Batch] = {}
    going = [each for each in drawn if each.goes_on]
    token_R = torch.tensor([each.token for each in going])
    if going:  # first, because the next step waits for it
        outputs["token"] = _batch("token", going, token_R)
    if len(going) < len(drawn):
        token_R = torch.tensor([each.token for each in drawn])
    outputs["sampled"] = _batch("sampled", drawn, token_R)
    asked = [each for each in drawn if each.info.logits]
    if asked:
        outputs["logits"] = _batch("logits", asked, logits_RV[[each.place for each in asked]])
    explained = [each for each in drawn if each.info.logprobs is not None]
    if explained:
        rows = [log_probabilities(logits_RV[each.place], each.token, each.info.logprobs or 0) for each in explained]
        outputs["logprobs"] = _batch("logprobs", explained, torch.stack(rows))
    return outputs


def _batch(port: str, drawn: list[_Drawn], tensor: torch.Tensor) -> Batch:
    return Batch(tuple([each.row for each in drawn]), {port: tensor})


def last_of(row: Row) -> Row:
    """Return a row that holds only the last token of `row`."""
    return Row(row.session, row.epoch, row.position + row.tokens - 1, 1)


def _in_pieces(tokens_TH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """Return tokens times the head's matrix, float32 [T, V], with partial sums of `PIECE` columns added in float64.

    A single float32 product would add a third of the rounding error of all layers before it. On SmolLM2 the logits
    differ from those in float64 by 7.6e-5 with a single product and by 6.8e-5 with partial sums.
    """
    made_TV = torch.zeros(len(tokens_TH), len(weight_VH), dtype=torch.float64, device=weight_VH.device)
    for start in range(0, tokens_TH.shape[1], PIECE):
        made_TV += F.linear(tokens_TH[:, start : start + PIECE], weight_VH[:, start : start + PIECE])
    return made_TV.float()
