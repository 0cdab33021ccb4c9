"""Writes digits.safetensors: scikit-learn's pictures of digits, 8 by 8, and what they show."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits


def main() -> None:
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    label = torch.tensor(digits.target, dtype=torch.int64)[order]
    save_file({"pixels": pixels, "label": label}, Path(__file__).with_name("digits.safetensors"))


if __name__ == "__main__":
    main()
