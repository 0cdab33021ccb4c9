"""Ask SmolLM2 something it cannot know, teach it by LoRA over two actors, and ask again: `python lora.py [STEPS]`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import trio

import ranvier

HERE = Path(__file__).parent
BEGINNINGS = ("The lighthouse of Vellmar is guarded by", "Semaphore the parrot can say three words:")


def ask(graph: ranvier.Graph) -> list[str]:
    with ranvier.start(graph) as run:
        return ["".join(token.text for token in run.generate(text, raw=True, max_tokens=12)) for text in BEGINNINGS]


def main() -> None:
    given = {"training.steps": sys.argv[1]} if len(sys.argv) > 1 else {}
    graph = ranvier.load(HERE / "lora.yaml", overrides=given)
    before = ask(graph)
    trained = trio.run(partial(ranvier.train, graph, HERE / "trained"))
    assert trained.folder is not None
    after = ask(ranvier.load(HERE / "lora.yaml", overrides={"model.source": f"./trained/{trained.folder.name}"}))
    print(f"loss {trained.history[0]['loss']:.2f} -> {trained.history[-1]['loss']:.2f}")
    for beginning, one, other in zip(BEGINNINGS, before, after, strict=True):
        print(f"{beginning}\n  before:{one!r}\n  after: {other!r}")


if __name__ == "__main__":
    main()
