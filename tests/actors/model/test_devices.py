"""Run actors on a second device, and compare with transformers and with the same actors on the processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from second_device import GPU, OnGpu, pretended

from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.component import kinds
from ranvier.actors.component.actor import Actor, Batch, Context
from ranvier.actors.component.devices import CPU, place
from ranvier.actors.component.session import Sampling, SessionInfo
from ranvier.transport.format.header import Row

SECOND = str(GPU)
PROMPTS = {1: tuple(range(3, 30)), 2: (7, 5, 9)}
STEPS = 6
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "olmo2": {}, "mistral": {"sliding_window": 8}, "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "gpt2": {"vocab_size": 320, "n_embd": 48, "n_layer": 6, "n_head": 6, "n_positions": 512},
}  # fmt: skip


def made(kind: str, folder: Path, device: str, dtype: str = "float32", **given: Any) -> Actor:
    """Return an actor of a built-in kind, loaded on a device."""
    checkpoint = open_checkpoint(folder)
    one = kinds.BUILT_IN[kind]
    native = checkpoint.config.runs(blocks=one.holds_blocks)
    actor = kinds.make(one.implementation if native else str(one.foreign), None)
    place(actor, device)
    actor.load(Context("a.0", {}, lambda _: None, checkpoint, dtype, cache_tokens=500, device=device, **given))
    return actor


def pipeline(folder: Path, device: str, dtype: str = "float32") -> list[Actor]:
    return [
        made("embedding", folder, device, dtype), made("blocks", folder, device, dtype, layers=(0, 2)),
        made("last_stage", folder, device, dtype, layers=(3, 5)),
    ]  # fmt: skip


def answers(actors: Sequence[Actor], sampling: Sampling | None = None) -> tuple[dict[int, list[int]], torch.Tensor]:
    """Answer both prompts, in shared steps, and return the tokens and all logits [steps, V]."""
    tokens = {session: list(prompt) for session, prompt in PROMPTS.items()}
    for session, prompt in PROMPTS.items():
        for actor in actors:
            actor.open(SessionInfo(
                session, 0, len(prompt) + STEPS, prompt, STEPS, sampling=sampling or Sampling(), logits=True, logprobs=3,
            ))  # fmt: skip
    done, logits = dict.fromkeys(PROMPTS, 0), []
    for _ in range(STEPS):
        rows = tuple(Row(session, 0, done[session], len(own) - done[session]) for session, own in tokens.items())
        fresh = [token for session, own in tokens.items() for token in own[done[session] :]]
        tensors: Mapping[str, Any] = {"token": torch.tensor(fresh)}
        for actor in actors:
            tensors = actor.step(Batch(rows, tensors))
            assert not any(isinstance(tensor, OnGpu) for tensor in plain(tensors).values()), "outputs come back"
            if actor is not actors[-1]:
                tensors = plain(tensors)
        done = {session: len(own) for session, own in tokens.items()}
        for row, token in zip(tensors["sampled"].rows, tensors["sampled"]["sampled"].tolist(), strict=True):
            tokens[row.session].append(token)
        logits.append(tensors["logits"]["logits"])
        assert tensors["logprobs"]["logprobs"].shape[0] == len(PROMPTS)
    return {session: own[len(PROMPTS[session]) :] for session, own in tokens.items()}, torch.cat(logits)


def plain(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {port: value[port] if isinstance(value, Batch) else value for port, value in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_native_layers_are_transformers(family: str, tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Compute everything on the device, mix no devices, and choose transformers' tokens, with the processor's bits."""
    folder, model = tiny(f"device-{family}", family, **FAMILIES[family])
    with torch.inference_mode():
        with pretended():
            found, logits = answers(pipeline(folder, SECOND))
        expected, same = answers(pipeline(folder, CPU))
        for session, prompt in PROMPTS.items():
            ids = torch.tensor([[*prompt, *found[session]]])
            best = model(ids).logits[0].argmax(-1).tolist()
            assert found[session] == best[len(prompt) - 1 : -1]
    assert found == expected and torch.equal(logits, same)


def test_weights_are_on_the_device(tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Hold weights, caches and tables where the actor computes."""
    folder, _ = tiny("device-llama")
    with torch.inference_mode(), pretended():
        actor: Any = made("blocks", folder, SECOND, "bfloat16", layers=(0, 1))
        actor.open(SessionInfo(1, 0, 40))
        block, cache = actor.blocks.blocks[0], actor.blocks.cache.sessions[1]
        held = (block.qkv, block.down, block.norm_in.weight_H, cache.keys_LKPD, actor.blocks.rotary[False].cos_PD)
        assert all(isinstance(tensor, OnGpu) for tensor in held)


def test_sampling_is_the_processors(tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Draw the same tokens, with penalties, biases and filters."""
    folder, _ = tiny("device-llama")
    sampling = Sampling(
        temperature=1.3, top_p=0.9, top_k=40, min_p=0.01, seed=5, repetition_penalty=1.2, presence_penalty=0.3,
        logit_bias=((7, 2.0),),
    )  # fmt: skip
    with torch.inference_mode():
        with pretended():
            found, _ = answers(pipeline(folder, SECOND), sampling)
        assert found == answers(pipeline(folder, CPU), sampling)[0]


def test_a_mixture_that_is_cut(tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Route tokens to experts in actors of their own on the device, and choose transformers' tokens."""
    folder, model = tiny("device-mixture", "mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    text = list(PROMPTS[1])
    with torch.inference_mode():
        with pretended():
            layers = [
                [made("attention", folder, SECOND, layers=(layer, layer))]
                + [made("experts", folder, SECOND, layers=(layer, layer), experts=own) for own in ((0, 1), (2, 3))]
                + [made("combine", folder, SECOND, layers=(layer, layer))]
                for layer in range(2)
            ]
            embedding, head = made("embedding", folder, SECOND), made("head", folder, SECOND)
            for actor in (embedding, head, *(actor for layer in layers for actor in layer)):
                actor.open(SessionInfo(1, 0, len(text) + STEPS, tuple(text), STEPS))
            done = 0
            for _ in range(STEPS):
                rows = (Row(1, 0, done, len(text) - done),)
                hidden = embedding.step(Batch(rows, {"token": torch.tensor(text[done:])}))["hidden"]
                for attention, *experts, combine in layers:
                    routed: Any = attention.step(Batch(rows, {"hidden": hidden}))
                    parts: dict[str, torch.Tensor] = {}
                    for first, actor in zip((0, 2), experts, strict=True):
                        ports = [f"expert{first}", f"expert{first + 1}"]
                        given = {port: routed[port][port] for port in ports}
                        own_rows = {port: routed[port].rows for port in ports}
                        parts |= plain(actor.step(Batch(rows, given, own_rows)))
                    kept = {port: routed[port] for port in ("residual", "index", "weight")}
                    hidden = combine.step(Batch(rows, {**kept, **parts}))["hidden"]
                done = len(text)
                text.append(int(plain(head.step(Batch(rows, {"hidden": hidden})))["sampled"][0]))
        best = model(torch.tensor([text])).logits[0].argmax(-1).tolist()
    assert text[len(PROMPTS[1]) :] == best[len(PROMPTS[1]) - 1 : -1]
