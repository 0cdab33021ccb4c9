"""Compute rotary position embeddings (Su et al. 2021), half-split as in transformers' llama.

Shape suffixes: T tokens, P positions, D head width, N heads.
"""

from __future__ import annotations

import math

import torch

from ..checkpoint.config import RopeScaling
from ..component.devices import CPU


def inverse_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Return the inverse frequencies after scaling, float32 [D / 2].

    Raises:
        ValueError: the scaling does not have D / 2 factors.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        if len(scaling.factors) != len(frequencies):
            raise ValueError(f"rotary factors: expected {len(frequencies)}, got {len(scaling.factors)}")
        return frequencies / torch.tensor(scaling.factors)
    if scaling.kind == "yarn":
        return _yarn(frequencies, width, theta, scaling)
    return _llama3(frequencies, scaling)


def _yarn(frequencies: torch.Tensor, width: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    def dimension(turns: float) -> float:
        """Return the index of the frequency that turns `turns` times over the original context."""
        return width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    # 0: a fast frequency, unchanged; 1: a slow one, stretched by the factor
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    unchanged = 1 - ramp
    stretched = 1.0 / (scaling.factor * theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    return stretched * (1 - unchanged) + frequencies * unchanged


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_context / wavelengths
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 0: a long wavelength, stretched by the factor; 1: a short one, unchanged
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


class RotaryTable:
    """Hold cos and sin by position, computed once and extended when a session needs more."""

    def __init__(
        self, width: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype, device: str = CPU
    ) -> None:
        self._frequencies = inverse_frequencies(width, theta, scaling)
        self._attention_factor = scaling.attention_factor if scaling is not None else 1.0
        self._dtype = dtype
        self._device = device
        self.cos_PD = self.sin_PD = torch.empty(0, width, dtype=dtype, device=device)

    def at(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of each position, [T, D]."""
        return self.cos_PD[positions_T], self.sin_PD[positions_T]

    def reserve(self, positions: int) -> None:
        if positions <= self.cos_PD.shape[0]:
            return
        positions = -(-positions // 256) * 256
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)
        # computed in float32 and rounded once, as in transformers
        cos_PD, sin_PD = (each * self._attention_factor for each in (angles.cos(), angles.sin()))
        self.cos_PD, self.sin_PD = (each.to(self._dtype).to(self._device) for each in (cos_PD, sin_PD))


def rotate(heads_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its position's angles; `cos_TD` and `sin_TD` have one row per token."""
    half = heads_TND.shape[-1] // 2
    turned = torch.cat((-heads_TND[..., half:], heads_TND[..., :half]), dim=-1)
    return heads_TND * cos_TD[:, None] + turned * sin_TD[:, None]
