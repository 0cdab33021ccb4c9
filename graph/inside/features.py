"""Read the features of a sparse autoencoder (SAE) from a safetensors file (Bricken et al. 2023).

Shape suffixes: P positions, H hidden, F features, k features of a position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..file.errors import RequestError

if TYPE_CHECKING:
    import torch

NAMES: Mapping[str, tuple[str, ...]] = {
    "encoder": ("W_enc", "encoder.weight", "encoder_linear.weight"),
    "encoder_bias": ("b_enc", "encoder.bias", "encoder_linear.bias", "latent_bias"),
    "decoder": ("W_dec", "decoder.weight", "decoder_linear.weight"),
    "decoder_bias": ("b_dec", "decoder.bias", "pre_bias", "bias"),
    "threshold": ("threshold",),
    "log_threshold": ("log_threshold",),
}
"""The names that others give to the tensors of an SAE."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Hold the strongest features of each position: `features` int64 [P, k] and `strengths` float32 [P, k]."""

    features: torch.Tensor
    strengths: torch.Tensor


class Features:
    """Find the features of hidden states.

    Args:
        place: where the SAE was trained, such as `hidden 12`.
        file: safetensors with `W_enc` [H, F], `b_enc`, `W_dec` [F, H] and `b_dec`, or under the other `NAMES`; what is called
            `weight` is transposed. With `threshold` or `log_threshold`, weaker features are zero (JumpReLU, Rajamanoharan et
            al. 2024).
        top: how many features of each position are returned.
        centred: whether `b_dec` is subtracted first, as most SAEs do.

    Raises:
        RequestError: the file cannot be read, or holds no SAE.
    """

    def __init__(self, place: str, file: str | Path, top: int = 32, *, centred: bool = True) -> None:
        held = _read(Path(file))
        if "encoder" not in held or "decoder" not in held or held["encoder"].dim() != 2 or held["decoder"].dim() != 2:
            expected = " and ".join(NAMES[name][0] for name in ("encoder", "decoder"))
            raise RequestError(f"{file}: expected an SAE with the matrices {expected}, got {', '.join(held) or 'none'}")
        self.place = place
        self.top = top
        encoder, decoder = held["encoder"], held["decoder"]
        self._encoder_HF = encoder
        self.directions_FH = decoder
        """The direction of each feature, [F, H], for `ops.add`, `ops.clamp` and `ops.project_out`."""
        if self._encoder_HF.shape != self.directions_FH.T.shape:
            raise RequestError(
                f"{file}: expected an encoder and a decoder of one size, got {list(encoder.shape)} and {list(decoder.shape)}"
            )
        self._bias_F = held.get("encoder_bias", self._encoder_HF.new_zeros(()))
        self._centre_H = held.get("decoder_bias", self._encoder_HF.new_zeros(())) if centred else 0.0
        self._threshold_F = held["log_threshold"].exp() if "log_threshold" in held else held.get("threshold")

    def strengths(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        """Return how strong each feature is at each position, [P, F].

        Raises:
            RequestError: the hidden states have another width than the SAE.
        """
        if hidden_PH.shape[-1] != self._encoder_HF.shape[0]:
            raise RequestError(f"{self.place}: expected {self._encoder_HF.shape[0]} numbers, got {hidden_PH.shape[-1]}")
        made_PF = ((hidden_PH.float() - self._centre_H) @ self._encoder_HF + self._bias_F).relu()
        return made_PF if self._threshold_F is None else made_PF.where(made_PF > self._threshold_F, 0.0)

    def strongest(self, hidden_PH: torch.Tensor) -> Found:
        """Return the strongest features of each position."""
        strengths_PF = self.strengths(hidden_PH)
        found = strengths_PF.topk(min(self.top, strengths_PF.shape[1]))
        return Found(found.indices, found.values)


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an SAE, by their names in `NAMES`.

    Raises:
        RequestError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    ours = {name: own for own, names in NAMES.items() for name in names}
    try:
        with safe_open(file, framework="pt") as held:
            names = list(held.keys())
            found = {name: held.get_tensor(name).float() for name in names if name in ours}
            # torch keeps the matrix of a linear layer transposed
            return {
                ours[name]: tensor.T if name.endswith(".weight") and tensor.dim() == 2 else tensor
                for name, tensor in found.items()
            }
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{file}: cannot be read as safetensors: {error}") from None
