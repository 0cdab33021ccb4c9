"""Compare what the harness found in its runs: `check.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())["results"]


def samples(folder: Path, task: str) -> list[Any]:
    (path,) = folder.rglob(f"samples_{task}_2*.jsonl")
    return sorted(
        (sample["doc_id"], [response[0] for response in sample["resps"]]) for sample in map(json.loads, path.open())
    )


def scores(folder: Path) -> list[float]:
    """Return all scores of a run: of each place after each beginning, and of each text."""
    rated = [float(score) for _, places in samples(folder, "capitals") for score, _ in places]
    return rated + [
        float(text[0] if isinstance(text, list) else text) for _, texts in samples(folder, "prose") for text in texts
    ]


def main() -> None:
    out = Path(sys.argv[1])
    runs = {name: scores(out / name) for name in ("ids", "texts", "many")}
    for name, found in runs.items():
        apart = max(abs(a - b) for a, b in zip(found, runs["ids"], strict=True))
        print(f"{name}: {len(found)} scores, at most {apart:.2g} from those of ids")
        assert apart < 0.05, found
    for name in ("ids", "chat"):
        print(json.dumps(results(out / name)))
    assert results(out / "ids")["capitals"]["acc,none"] >= 0.75
    assert results(out / "chat")["capitals_said"]["exact_match,place"] >= 0.25


if __name__ == "__main__":
    main()
