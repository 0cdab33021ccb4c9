"""Create a model with random weights for a `config.json`, as transformers initialises it."""

from __future__ import annotations

from pathlib import Path

from ranvier.actors.checkpoint.hf_config import from_hf
from ranvier.actors.checkpoint.json_file import read_json
from ranvier.actors.component.kinds import BUILT_IN
from ranvier.actors.model import weights

from ..file.errors import RequestError

FILE = "model.safetensors"


def initialise(folder: Path | str, seed: int = 0, deviation: float = 0.02) -> Path:
    """Write `model.safetensors` with random float32 weights beside a `config.json`.

    Matrices are drawn from a normal distribution around 0. Norms are ones (zeros for `rms_plus_one`), biases are zeros.

    Args:
        folder: where the `config.json` is.
        seed: the seed of the random numbers.
        deviation: the standard deviation of the distribution (`initializer_range` in transformers' configs).

    Raises:
        CheckpointError: there is no such config.
        RequestError: there are weights already, or models of this family cannot be trained.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    config = from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    file = folder / FILE
    if file.exists():
        raise RequestError(f"{file} exists already; remove it first to draw new weights")
    if not config.native or config.experts or config.encoder is not None:
        raise RequestError(f"{folder}: models of the family {config.family} cannot be trained")
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for slot in weights.slots(BUILT_IN["model"], config, (0, config.layers - 1)):
        for name, shape in slot.needs():
            if slot.columns is not None:
                made[name] = torch.empty(shape).normal_(0, deviation, generator=generator)
            elif slot.name.endswith("_bias") or config.norm == "rms_plus_one":
                made[name] = torch.zeros(shape)
            else:
                made[name] = torch.ones(shape)
    save_file(made, file, {"format": "pt"})
    return file
