"""Distinguish English prose from Python programs, 256 bytes at a time: `python classify.py`."""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from pathlib import Path

import torch
from parts import Judge, Pairs
from safetensors.torch import save_file
from torch import nn

import ranvier

HERE = Path(__file__).parent


def pieces(data: bytes) -> torch.Tensor:
    """Return the text in rows of 256 bytes."""
    whole = len(data) // 256 * 256
    return torch.tensor(list(data[:whole])).view(-1, 256)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    library = Path(sysconfig.get_paths()["stdlib"])
    programs = b"".join((library / name).read_bytes() for name in ("argparse.py", "ast.py", "typing.py", "tarfile.py"))
    prose = "".join(pydoc_data.topics.topics.values()).encode()[: len(programs)]
    text = torch.cat((pieces(prose), pieces(programs)))
    kind = torch.tensor([0] * len(pieces(prose)) + [1] * len(pieces(programs)))
    order = torch.randperm(len(text))
    text, kind = text[order], kind[order]
    held_out = len(text) // 5

    pairs, judge = Pairs(), Judge()
    shares = pairs(text)["shares"]
    optimiser = torch.optim.Adam(judge.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(judge(shares[held_out:])["logits"], kind[held_out:]).backward()
        optimiser.step()
    save_file(judge.state_dict(), HERE / "judge.safetensors")

    with ranvier.start(ranvier.load(HERE / "classify.yaml", allow_code=True)) as run:
        logits = run.call(text=text[:held_out])["logits"]
    right = float((logits.argmax(1) == kind[:held_out]).float().mean())
    print(f"{held_out} pieces that were not trained on: {right:.1%} right")


if __name__ == "__main__":
    main()
