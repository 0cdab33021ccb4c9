"""Read an actor's slots from the checkpoint as tensors, and compute products and norms with them.

Shape suffixes: T tokens, H width, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from ranvier.transport.format.header import Row
from ranvier.transport.format.tensors import torch_dtype

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.config import ModelConfig
from ..checkpoint.quantised import Codes, Quantised, Tile
from ..checkpoint.tensors import StoredRows, TensorEntry
from ..component.actor import Actor, Batch, Context, RowsFailed
from ..component.devices import CPU, here
from ..errors import NotFinite
from .coded import Coded, in_4_bits, in_8_bits, of_blocks
from .kernels import packed
from .kernels.packed import Packed
from .slots import Slot
from .weights import AS_IT_IS, packed_as, packs

Matrix = torch.Tensor | Packed | Coded
"""A matrix for products: plain, packed for the processor's kernels, or coded on a GPU."""
KINDS = {"bfloat16": packed.BFLOAT16, "int8": packed.INT8, "int4": packed.INT4}


def needed(context: Context) -> tuple[Checkpoint, torch.dtype]:
    """Return the checkpoint and the dtype that a built-in kind is loaded with."""
    assert context.checkpoint is not None, "the check of the graph gives every built-in kind its checkpoint"
    return context.checkpoint, torch_dtype(context.dtype)


def sent(
    actor: Actor, port: str, rows: tuple[Row, ...], made_TH: torch.Tensor, finite: bool | None = None
) -> Mapping[str, torch.Tensor | Batch]:
    """Return the output of a step, after a check that all numbers are finite.

    It stays on the device if `actor.stays`, otherwise it comes to this machine's memory. `finite`: what is known already. The
    output of an actor that runs ahead of its GPU is not checked.

    Raises:
        RowsFailed: some rows have NaN or infinity. The others have taken their step.
    """
    made_TH = made_TH if actor.stays else here(made_TH)
    if actor.ahead or (_all_finite(made_TH) if finite is None else finite):
        return {port: made_TH}
    failures: dict[Row, Exception] = {}
    good, parts, end = [], [], 0
    for row in rows:
        start, end = end, end + row.tokens
        part_tH = made_TH[start:end]
        wrong = part_tH[~part_tH.isfinite()]
        if wrong.numel():
            failures[row] = NotFinite(port, float(wrong[0]))
        else:
            good.append(row)
            parts.append(part_tH)
    raise RowsFailed({port: Batch(tuple(good), {port: torch.cat(parts)})} if good else {}, failures)


def finite(actor: Actor, what: str, made_TH: torch.Tensor) -> torch.Tensor:
    """Return what an actor that keeps nothing sends, as `sent` does. Its step is repeated row by row on an error.

    Raises:
        NotFinite: a number of `made_TH` is NaN or infinite.
    """
    made_TH = made_TH if actor.stays else here(made_TH)
    if not actor.ahead and not _all_finite(made_TH):
        raise NotFinite(what, float(made_TH[~made_TH.isfinite()][0]))
    return made_TH


EXPONENTS = {torch.float32: (1, 0x7F80_0000), torch.bfloat16: (0, 0x7F80), torch.float16: (0, 0x7C00)}
"""Bits of a number's exponent, and whether the number has 32 bits. All of them are set in NaN and infinity."""


def _all_finite(made_TH: torch.Tensor) -> bool:
    library, found = packed.library(), EXPONENTS.get(made_TH.dtype)
    if library is None or found is None or not made_TH.is_cpu or not made_TH.is_contiguous():
        return bool(made_TH.isfinite().all())
    # one call of C, which takes 1 us
    return bool(library.ranvier_finite(made_TH.data_ptr(), made_TH.numel(), *found))


def read_slot(slot: Slot, checkpoint: Checkpoint, dtype: torch.dtype, device: str = CPU) -> torch.Tensor:
    """Read the tensor of a slot, with its parts stacked by rows, onto a device."""
    readable = dtype is torch.bfloat16 and len(slot.parts) == 1 and packed.library() is not None
    if readable and (parts := _stored(slot, checkpoint)) is not None:
        return packed.read_stored(parts[0]).to(device)
    tensor = torch.empty(slot.shape, dtype=dtype)
    start = 0
    for name, rows in slot.parts:
        part = tensor[start : start + rows]
        checkpoint.read_into(name, part.t() if slot.transposed else part)
        start += rows
    return tensor.to(device)


def by_torch(slot: Slot, dtype: torch.dtype, device: str) -> bool:
    """Return whether torch computes the products with a matrix: the kernels lack its dtype, shape, processor or device."""
    return device != CPU or dtype is not torch.bfloat16 or not packs(slot) or packed.library() is None


def read_matrix(
    slot: Slot, checkpoint: Checkpoint, dtype: torch.dtype, precision: str, fast: bool, device: str = CPU
) -> Matrix:
    """Read a matrix for products with tokens: packed if the processor's kernels compute them, coded on a GPU if it is to be.

    With `fast`, its products may depend on the number of tokens.
    """
    if device != CPU and packs(slot) and packed_as(slot, checkpoint, precision) != "bfloat16":
        return Coded(_codes(slot, checkpoint, precision), dtype, device)
    if by_torch(slot, dtype, device):
        return read_slot(slot, checkpoint, dtype, device)
    matrix = _packed(slot, checkpoint, dtype, precision)
    matrix.matrix.fast = fast
    return matrix


def read_matrices(
    slots: Iterable[Slot], checkpoint: Checkpoint, dtype: torch.dtype, context: Context
) -> dict[str, Matrix]:
    """Read matrices for products as an actor needs them, by the names of their slots (`read_matrix`)."""
    return {
        slot.name: read_matrix(slot, checkpoint, dtype, context.precision, context.fast, context.device)
        for slot in slots
    }


def _codes(slot: Slot, checkpoint: Checkpoint, precision: str) -> list[Codes]:
    """Return the parts of a matrix as whole numbers of 8 or 4 bits, as the file has them if it can be."""
    held = packed_as(slot, checkpoint, precision)
    entries = [checkpoint.tensors[name] for name, _ in slot.parts]
    quantised = [entry for entry in entries if isinstance(entry, Quantised)]
    if precision == "stored" and len(quantised) == len(entries):
        tile: Tile = "int4" if held == "int4" else "int8"
        return [entry.codes(tile) for entry in quantised]
    stored = _stored(slot, checkpoint) if precision == "stored" else None
    if stored is not None and {AS_IT_IS[part.stored] for part in stored} == {held}:
        return [of_blocks(part) for part in stored]
    wide = read_slot(slot, checkpoint, torch.float32)
    return [in_8_bits(wide) if held == "int8" else in_4_bits(wide)]


def _packed(slot: Slot, checkpoint: Checkpoint, dtype: torch.dtype, precision: str) -> Packed:
    held = packed_as(slot, checkpoint, precision)
    entries = [checkpoint.tensors[name] for name, _ in slot.parts]
    quantised = [entry for entry in entries if isinstance(entry, Quantised)]
    if precision == "stored" and held != "bfloat16" and len(quantised) == len(entries):
        tile: Tile = "int4" if held == "int4" else "int8"
        return packed.pack_codes([entry.codes(tile) for entry in quantised], KINDS[held])
    stored = _stored(slot, checkpoint) if precision in ("dtype", "stored") else None
    if (
        stored is not None
        and all(part.rows % packed.TILE == 0 for part in stored)
        and (held == "bfloat16" or {AS_IT_IS[part.stored] for part in stored} == {held})
    ):
        return packed.pack_stored(stored, KINDS[held])
    if held == "bfloat16":
        return packed.pack_bfloat16(read_slot(slot, checkpoint, dtype))
    wide = read_slot(slot, checkpoint, torch.float32)
    return packed.pack_int8(wide) if held == "int8" else packed.pack_int4(wide)


def _stored(slot: Slot, checkpoint: Checkpoint) -> list[StoredRows] | None:
    """Return the parts of a matrix as GGUF blocks; None if a part is stored in another way, or must be changed when read."""
    if slot.columns is None:
        return None
    for name, _ in slot.parts:
        entry = checkpoint.tensors.get(name)
        if (
            not isinstance(entry, TensorEntry) or entry.stored not in packed.STORED or entry.added or entry.factors
            or entry.transposed != slot.transposed
        ):  # fmt: skip
            return None
    return [checkpoint.stored_rows(name, shape) for name, shape in slot.needs()]


def product(tokens_TC: torch.Tensor, matrix: Matrix, bias_R: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply tokens by a matrix [R, C]: [T, R]."""
    if isinstance(matrix, torch.Tensor):
        return F.linear(tokens_TC, matrix, bias_R)
    made_TR = matrix.multiply(tokens_TC)
    return made_TR if bias_R is None else made_TR + bias_R


def ids_beside(weight_VH: torch.Tensor, token_T: torch.Tensor) -> torch.Tensor:
    """Return token ids where an embedding is. Those for a GPU are checked first: a wrong one would end the process there.

    Raises:
        IndexError: the embedding has no row for an id.
    """
    if weight_VH.is_cpu or not token_T.is_cpu:
        return token_T
    if token_T.numel():
        make_sure_of_ids(int(token_T.min()), int(token_T.max()), weight_VH.shape[0])
    return token_T.to(weight_VH.device)


def make_sure_of_ids(least: int, most: int, count: int) -> None:
    """Raise IndexError if token ids are not all below `count`, or negative."""
    if least < 0 or most >= count:
        raise IndexError(f"token: expected ids from 0 to {count - 1}, got {least} to {most}")


def unpacked(matrix: Matrix) -> torch.Tensor | Coded:
    """Return a matrix of an actor on a GPU, where none is packed."""
    assert not isinstance(matrix, Packed)
    return matrix


class Norm:
    """Compute a norm over the last dimension, in float32 for every dtype; each kind rounds where transformers does.

    Root-mean-square: Zhang and Sennrich 2019. Layer norm: Ba et al. 2016.
    """

    def __init__(self, config: ModelConfig, weight_H: torch.Tensor, bias_H: torch.Tensor | None = None) -> None:
        self._kind = config.norm
        self._eps = config.norm_eps
        self.weight_H = weight_H
        self.bias_H = bias_H
        self._wide: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def factors(self) -> torch.Tensor:
        """Return the factors of the normalised numbers, float32 [H]."""
        wide_H = self.weight_H.float().contiguous()
        return 1.0 + wide_H if self._kind == "rms_plus_one" else wide_H

    def before(self, matrix: Packed, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Return a matrix times the norm of bfloat16 or float32 [T, H], in float32 throughout: [T, R]."""
        if self._wide is None:
            self._wide = self.factors(), self.bias_H.float().contiguous() if self.bias_H is not None else None
        return matrix.after_norm(hidden_TH, *self._wide, self._kind == "layer", self._eps)

    def __call__(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        if self._kind == "layer":
            return F.layer_norm(hidden_TH, self.weight_H.shape, self.weight_H, self.bias_H, self._eps)
        wide = hidden_TH.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        if self._kind == "rms_plus_one":
            return (wide * (1.0 + self.weight_H.float())).to(hidden_TH.dtype)
        return self.weight_H * wide.to(hidden_TH.dtype)
