"""Read the same windows from files of token ids in every format, and refuse other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy

import ranvier
from ranvier.graph.training import data
from ranvier.graph.training.planner import training_plan

CONTEXT, BATCH, MICRO = 12, 8, 4
Plans = Callable[[str], Any]


@pytest.fixture
def plans(tiny: Any, split: Any, graph_file: Callable[..., Path]) -> Plans:
    """Provide a function that returns the training plan of a graph that learns from a file of tokens."""
    model, _ = tiny("llama")

    def make(file: str) -> Any:
        section = {
            "data": {"tokens": file, "context": CONTEXT, "held_out": 0.25}, "batch": BATCH, "micro_batches": MICRO, "steps": 4,
            "validate": {"every": 2, "batches": 2},
        }  # fmt: skip
        path = graph_file(model={"source": "unset", "dtype": "float32"}, training=section, **split(2, 6))
        return training_plan(ranvier.load(path, overrides={"model.source": str(model)}))

    return make


def written(folder: Path, name: str, ids: numpy.ndarray[Any, Any]) -> str:
    """Write the ids in the format of the name's suffix, and return the path for the graph file."""
    if name.endswith(".bin"):
        ids.astype("<u2").tofile(folder / name)
    elif name.endswith(".npy"):
        numpy.save(folder / name, ids)
    else:
        safetensors.numpy.save_file({"whatever": ids}, folder / name)
    return f"./{name}"


@pytest.mark.parametrize("name", ["ids.bin", "ids.npy", "ids.safetensors"])
def test_windows_of_token_ids(name: str, plans: Plans, tmp_path: Path) -> None:
    """Cut windows from the file, each with the tokens that follow it.

    Training never sees the last quarter. Validation sees only that quarter, in order."""
    # No id occurs twice, so the first id of a window gives its position.
    ids = numpy.random.default_rng(3).permutation(300).astype(numpy.int32)
    found = data.of(plans(written(tmp_path, name, ids)), allow_code=False)
    at = {int(value): index for index, value in enumerate(ids)}
    for step in range(4):
        batch = found.training(step)
        assert batch["token"].shape == (BATCH * CONTEXT,)
        for window, target in zip(
            batch["token"].view(BATCH, CONTEXT), batch["target"].view(BATCH, CONTEXT), strict=True
        ):
            start = at[int(window[0])]
            assert start + CONTEXT < 225
            assert window.tolist() == ids[start : start + CONTEXT].tolist()
            assert target.tolist() == ids[start + 1 : start + CONTEXT + 1].tolist()
        assert batch["token"].equal(found.training(step)["token"]), "a step that is taken again is the same"
    held = [found.validation(index)["token"].tolist() for index in range(2)]
    assert held[0] + held[1] == ids[225 : 225 + 2 * (BATCH // MICRO) * CONTEXT].tolist()


@pytest.mark.parametrize(
    ("name", "ids", "words"),
    [
        ("ids.bin", numpy.array([5, 320, 7]), "ids.bin: expected token ids from 0 to 319, got 5 to 320"),
        ("ids.npy", numpy.zeros((4, 5), numpy.int64), r"ids.npy: expected a row of integers, got int64\[4, 5\]"),
        ("ids.npy", numpy.zeros(400), r"ids.npy: expected a row of integers, got float64\[400\]"),
        ("ids.bin", numpy.arange(14), "ids.bin has 14 tokens, 3 of them held out: expected more than the context, 12"),
    ],
)
def test_what_is_no_row_of_tokens(
    name: str, ids: numpy.ndarray[Any, Any], words: str, plans: Plans, tmp_path: Path
) -> None:
    """Refuse ids out of range, a wrong shape or dtype, and too few tokens."""
    with pytest.raises(ranvier.RequestError, match=words):
        data.of(plans(written(tmp_path, name, ids)), allow_code=False)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ids.txt", b"1 2 3", r"^training: data: ids.txt: expected tokens in a .bin, .npy or .safetensors file"),
        ("ids.npy", b"\x93NUMPY rubbish", "ids.npy: "),
        ("ids.npy", b"\x80\x04\x95pickle.", "ids.npy: "),
        ("ids.safetensors", b"rubbish", "ids.safetensors: "),
        ("ids.bin", b"\x01\x02\x03", "ids.bin: "),
        ("ids.bin", b"", "ids.bin has 0 tokens"),
    ],
)
def test_what_cannot_be_read(name: str, content: bytes, words: str, plans: Plans, tmp_path: Path) -> None:
    """Refuse a file that is not in one of the formats."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ranvier.RequestError, match=words):
        data.of(plans(f"./{name}"), allow_code=False)


def test_two_files_are_not_one(plans: Plans, tmp_path: Path) -> None:
    """Refuse a file with two tensors."""
    safetensors.numpy.save_file({"a": numpy.arange(9), "b": numpy.arange(9)}, tmp_path / "ids.safetensors")
    with pytest.raises(ranvier.RequestError, match="expected one tensor of token ids, got a, b"):
        data.of(plans("./ids.safetensors"), allow_code=False)
