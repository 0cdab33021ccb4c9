"""Look at a model through its own head, and through sparse autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ranvier

PROMPT = [1, 17, 40, 9, 300, 12, 77]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_lens_is_the_models_own_head(
    family: str, tiny: Any, split: Any, graph_file: Callable[..., Path], runs: Path
) -> None:
    """Show the tokens that transformers' final norm and head give for its own hidden states."""
    sizes = {"vocab_size": 320, "n_embd": 48, "n_layer": 6, "n_head": 6, "n_positions": 512} if family == "gpt2" else {}
    folder, model = tiny(f"lens-{family}", family, **sizes)
    with torch.inference_mode():
        seen = model(torch.tensor([PROMPT]), output_hidden_states=True, use_cache=False)
        inner = model.transformer if family == "gpt2" else model.model
        norm = inner.ln_f if family == "gpt2" else inner.norm
        logits = torch.stack([model.lm_head(norm(hidden[0])) for hidden in seen.hidden_states[:-1]])
        cap = getattr(model.config, "final_logit_softcapping", None)
        logits = torch.cat(
            [torch.tanh(logits / cap) * cap if cap else logits, seen.logits]
        )  # the last one is normed there
    content = {"model": {"source": "./set", "dtype": "float32"}, **split(4, 6)}
    graph = ranvier.load(graph_file(**content), overrides={"model.source": str(folder)})
    with ranvier.start(graph, runs=runs) as run:
        lens = run.lens(PROMPT, top=3)
        assert lens.places == tuple(f"hidden {layer}" for layer in range(7))
        wanted = logits.softmax(-1).topk(3)
        torch.testing.assert_close(lens.probabilities, wanted.values, rtol=1e-3, atol=1e-5)
        assert (lens.tokens == wanted.indices).float().mean() > 0.98, "near ties may change places"
        lines = lens.table(lambda ids: f"<{ids[0]}>").splitlines()
        assert len(lines) == 7
        assert lines[6].startswith(f"hidden 6     '<{int(wanted.indices[6, -1, 0])}>' ")


def test_features_of_an_autoencoder(four: Callable[..., ranvier.Graph], tmp_path: Path, runs: Path) -> None:
    """Find the strongest features under the names that others give to an SAE's tensors, and steer by a feature's direction."""
    torch.manual_seed(3)
    encoder, decoder = torch.randn(48, 200), torch.randn(200, 48)
    biases = torch.randn(200), torch.randn(48)
    threshold = torch.full((200,), 2.0)
    save_file({"W_enc": encoder, "W_dec": decoder, "b_enc": biases[0], "b_dec": biases[1], "threshold": threshold},
              tmp_path / "sae.safetensors")  # fmt: skip
    save_file({"encoder.weight": encoder.T.contiguous(), "encoder.bias": biases[0], "decoder.weight": decoder.T.contiguous(),
               "decoder.bias": biases[1]}, tmp_path / "other.safetensors")  # fmt: skip
    save_file({"weight": encoder}, tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with ranvier.start(four(), runs=runs) as run:
        hidden = run.read(PROMPT, reads=["hidden 3"])["hidden 3"]
        dense = ((hidden - biases[1]) @ encoder + biases[0]).relu()
        sparse = torch.where(dense > 2, dense, 0)
        for file, strengths in (("sae", sparse), ("other", dense)):
            features = run.features("hidden 3", tmp_path / f"{file}.safetensors", top=4)
            found = features.of(PROMPT)
            torch.testing.assert_close(found.strengths, strengths.topk(4).values, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(strengths.gather(1, found.features), found.strengths, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(features.features.directions_FH, decoder)
        steered = ranvier.ops.add("hidden 3", features.features.directions_FH[7], scale=3)
        assert [t.id for t in run.generate(PROMPT, edits=[steered])] != [t.id for t in run.generate(PROMPT)]
        for file, said in (("none", "expected an SAE with the matrices W_enc and W_dec, got none"),
                           ("text", "cannot be read as safetensors"), ("missing", "cannot be read")):  # fmt: skip
            with pytest.raises(ranvier.RequestError, match=said):
                run.features("hidden 3", tmp_path / f"{file}.safetensors")
        with pytest.raises(ranvier.RequestError, match="layer 2 query: expected 48 numbers, got 8"):
            run.features("layer 2 query", tmp_path / "sae.safetensors").of(PROMPT)
