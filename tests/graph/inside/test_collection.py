"""Collect the activations of many prompts, be interrupted, and go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ranvier

PROMPTS = [[1, 5 + number, *range(9, 11 + number % 4)] for number in range(20)]


def joined(files: tuple[Path, ...]) -> dict[str, torch.Tensor]:
    parts = [load_file(file) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_an_interrupted_collection_goes_on(four: Callable[..., ranvier.Graph], tmp_path: Path, runs: Path) -> None:
    """Write each prompt once, in order, whatever breaks in between, and what `read` returns."""
    labels = [number % 3 for number in range(len(PROMPTS))]
    wanted = {"reads": ["hidden 2-3", "layer 1 heads"], "labels": labels, "rows_per_file": 12, "at_once": 3}

    def failing(after: int) -> Iterator[list[int]]:
        yield from PROMPTS[:after]
        raise KeyError("the data set broke")

    with ranvier.start(four(), runs=runs) as run:
        for after in (7, 13):
            with pytest.raises(KeyError, match="the data set broke"):
                run.collect(failing(after), folder=tmp_path / "made", **wanted)
        before = sorted((tmp_path / "made").iterdir())
        assert before
        (tmp_path / "made" / "activations-00009.part").write_bytes(b"cut off")  # as a crash leaves it
        made = run.collect(PROMPTS, folder=tmp_path / "made", **wanted)
        assert list(made.files[: len(before)]) == before
        again = run.collect(PROMPTS, folder=tmp_path / "made", **wanted)
        assert again == made
        whole = run.collect(PROMPTS, folder=tmp_path / "whole", **{**wanted, "rows_per_file": 10_000, "at_once": 20})
        assert len(whole.files) == 1 < len(made.files)
        assert (made.prompts, made.rows) == (whole.prompts, whole.rows) == (20, sum(map(len, PROMPTS)))
        found, expected = joined(made.files), joined(whole.files)
        assert (
            found.keys() == {"hidden_2", "hidden_3", "layer_1_heads", "prompt", "position", "label"} == expected.keys()
        )
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
        for number in (0, 11, 19):
            mine = found["prompt"] == number
            read = run.read(PROMPTS[number], reads=["hidden 2-3", "layer 1 heads"])
            assert found["position"][mine].tolist() == list(range(len(PROMPTS[number])))
            assert set(found["label"][mine].tolist()) == {labels[number]}
            for place, values in read.items():
                torch.testing.assert_close(found[place.replace(" ", "_")][mine], values, rtol=1e-4, atol=1e-5)


def test_positions_dtypes_and_errors(four: Callable[..., ranvier.Graph], tmp_path: Path, runs: Path) -> None:
    """Keep only some positions, round, and refuse a folder that holds something else."""
    with ranvier.start(four(), runs=runs) as run:
        made = run.collect(PROMPTS, ["hidden 6"], tmp_path / "last", at="last", dtype="bfloat16")
        found = joined(made.files)
        assert found["position"].tolist() == [len(prompt) - 1 for prompt in PROMPTS]
        assert found["hidden_6"].dtype is torch.bfloat16
        assert found["hidden_6"].shape == (20, 48)
        for expected, options in (
            (
                "expected prompts from 0 on with .*'hidden 5'",
                {"reads": ["hidden 5"], "at": "last", "dtype": "bfloat16"},
            ),
            ("expected prompts from 0 on with .*'float32'", {"reads": ["hidden 6"], "at": "last"}),
        ):
            with pytest.raises(ranvier.RequestError, match=expected):
                run.collect(PROMPTS, folder=tmp_path / "last", **options)
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("dtype: expected float32", {"dtype": "int8"}),
            ("labels: expected a whole number for prompt 1, got none", {"labels": [1]}),
            ("labels: expected a whole number for prompt 0, got 'a'", {"labels": ["a"] * 20}),
            (r"at: expected positions from -\d to \d, got 7", {"at": 7}),
            ("place 'hidden 9'", {"reads": ["hidden 9"]}),
        ]
        for expected, options in wrong:
            with pytest.raises(ranvier.RequestError, match=expected):
                run.collect(PROMPTS, **{"reads": ["hidden 1"], "folder": tmp_path / "wrong", **options})
        others: list[tuple[str, dict[str, Any]]] = [
            ("holds other prompts", {"prompts": [*PROMPTS[:-1], [1, 2]]}),
            ("expected prompts from 0 on with", {"at": [0, 1]}),
            ("expected prompts from 0 on with", {"edits": [ranvier.ops.zero("hidden 2")]}),
        ]
        for expected, options in others:
            with pytest.raises(ranvier.RequestError, match=expected):
                run.collect(**{"prompts": PROMPTS, "reads": ["hidden 6"], "folder": tmp_path / "last", "at": "last",
                               "dtype": "bfloat16", **options})  # fmt: skip
        with pytest.raises(ranvier.RequestError, match="layer 1 pattern has as many numbers as its prompt"):
            run.collect(PROMPTS, ["layer 1 pattern"], tmp_path / "pattern")
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "activations-00000.safetensors").write_text("no tensors")
        with pytest.raises(ranvier.RequestError, match="cannot be continued"):
            run.collect(PROMPTS, ["hidden 1"], tmp_path / "bad")
