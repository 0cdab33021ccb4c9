"""Train on a second device that the processor stands in for, and compare with transformers' gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from second_device import GPU, OnGpu, pretended

from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.component.actor import Context
from ranvier.actors.component.kinds import BUILT_IN
from ranvier.actors.protocol.training_spec import LOGITS, Loss, Optimizer
from ranvier.actors.training import optimizer, shards
from ranvier.actors.training.layers import NativeStage
from ranvier.actors.training.stage import TrainedStage

SEQUENCE = 12
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {}, "gemma3_text": {"sliding_window": 8},
    "gpt2": {"vocab_size": 320, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 512},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
ADAMW = Optimizer(lr=0.01)


def stage_of(folder: Path, device: str = str(GPU), *, lora: tuple[int, float] | None = None) -> TrainedStage:
    context = Context("all.0", {}, lambda _: None, open_checkpoint(folder), "float32", device=device)
    module = NativeStage(BUILT_IN["model"], context, SEQUENCE, lora)
    return TrainedStage("all.0", module, [Loss(LOGITS, "cross_entropy", "targets")], [], [])


def on_gpu(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor.to(GPU) for name, tensor in tensors.items()}


def made(family: str, tiny: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    sizes = {} if family == "gpt2" else {"num_hidden_layers": 3, "attn_implementation": "eager"}
    return tiny(f"train-device-{family}", family, **{**sizes, **FAMILIES[family]})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_gradients_are_transformers(family: str, split: bool, tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Compute forward, loss and backward on the device, mix no devices, and get transformers' loss and gradients."""
    folder, model = made(family, tiny)
    torch.manual_seed(3)
    ids = torch.randint(3, 320, (2, SEQUENCE + 1))
    with pretended():
        stage = stage_of(folder)
        assert all(isinstance(weight, OnGpu) for weight in stage.weights.values())
        given = on_gpu(token=ids[:, :-1].flatten()), on_gpu(targets=ids[:, 1:].flatten())
        _, [value] = stage.forward(0, *given, 1.0)
        if split:
            stage.backward_inputs(0, {})
            stage.backward_weights(0)
        else:
            stage.backward(0, {})
        zero = {name: torch.zeros_like(weight) for name, weight in stage.weights.items()}
        gradients = {name: tensor.cpu() for name, tensor in stage.exported({**zero, **stage.gradients()}).items()}
    model.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    assert value.loss == pytest.approx(loss.item(), rel=1e-5)
    compared = expected.keys() & gradients.keys()
    assert len(compared) >= 20
    for name in compared:
        torch.testing.assert_close(gradients[name], expected[name], rtol=2e-3, atol=2e-5)


def test_updates_and_shards(tiny: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    """Update on the device, save, resume there, and go on with the same bits."""
    folder, _ = made("llama", tiny)
    torch.manual_seed(4)
    tokens, targets = torch.randint(0, 320, (SEQUENCE,)), torch.randint(0, 320, (SEQUENCE,))

    def update(stage: TrainedStage, made: torch.optim.Optimizer, number: int) -> float:
        _, [value] = stage.forward(number, on_gpu(token=tokens), on_gpu(targets=targets), 1.0)
        stage.backward(number, {})
        assert optimizer.squares(stage.gradients().values()) > 0
        made.step()
        stage.updated()
        return value.loss

    with pretended():
        first = stage_of(folder, lora=(4, 1.0))
        adamw = optimizer.make(ADAMW, first.weights.values())
        before = [update(first, adamw, number) for number in range(3)]
        shards.write(tmp_path, 3, "all", first, adamw, 3)
        second = stage_of(folder, lora=(4, 1.0))
        again = optimizer.make(ADAMW, second.weights.values())
        [place] = [file.parent for file in tmp_path.rglob("all.state.safetensors")]
        assert shards.read(place, "all", second, again) == 3
        assert update(first, adamw, 3) == update(second, again, 3) < before[-1] < before[0]
        assert all(torch.equal(one.cpu(), second.weights[name].cpu()) for name, one in first.weights.items())
