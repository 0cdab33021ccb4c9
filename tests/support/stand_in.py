"""Make the stand-in of second_device.py the GPU of a host process, from a graph's own code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# own code begins with this
SOURCE = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport stand_in\nstand_in.install()\n"


def install() -> None:
    """Pretend for as long as this process lives, if it was given a GPU."""
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return
    from second_device import GPU, pretended

    from ranvier.actors.component import module
    from ranvier.actors.host import loading

    loading.own_name = lambda device: str(GPU) if device != "cpu" else device
    loading.wait_for_memory = lambda *_: True
    module._place = lambda name, tensor: name  # its memory has no address
    globals()["modes"] = modes = pretended()  # its end would come with that of the last reference
    modes.__enter__()


def there(tensor: Any) -> bool:
    """Return whether a tensor is where this process computes."""
    return tensor.device.type == "lazy" or "CUDA_VISIBLE_DEVICES" not in os.environ
