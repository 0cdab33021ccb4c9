"""Run actors' decode steps by the kernels of a GPU, in Triton's interpreter, and compare with transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from second_device import GPU, OnGpu, pretended

from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.checkpoint.quantised import Codes
from ranvier.actors.component import kinds
from ranvier.actors.component.actor import Actor, Batch, Context, RowsFailed
from ranvier.actors.component.devices import place
from ranvier.actors.component.session import Sampling, SessionInfo
from ranvier.actors.errors import NotFinite
from ranvier.actors.model.coded import Coded, in_4_bits, in_8_bits
from ranvier.actors.model.gpu import fused, launches, paged_cache
from ranvier.transport.format.header import Row

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True}, "qwen2": {}, "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 8},
    "llama-yarn": {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0,
    }},
}  # fmt: skip
PROMPTS = {1: tuple(range(3, 30)), 2: (7, 5, 9)}
LATE = {4: (8, 8, 90, 31)}
"""A session that begins while the others decode."""
STEPS = 4
CUTS: tuple[dict[str, tuple[int, int] | None], ...] = (
    {"model": None},
    {"embedding": None, "blocks": (0, 0), "last_stage": (1, 1)},
    {"first_stage": (0, 0), "blocks": (1, 1), "head": None},
)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the kernels take the stand-in's tensors, and float32, in small pages. Provide the names of those that were run."""
    run, names = launches.Launch.run, []

    def own(launch: launches.Launch) -> None:
        names.append(launch.name)
        taken = tuple(each.own if isinstance(each, OnGpu) else each for each in launch.arguments)
        run(launches.Launch(launch.name, launch.kernel, launch.grid, taken, launch.constants, launch.options))

    monkeypatch.setattr(launches.Launch, "run", own)
    monkeypatch.setattr(fused, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(fused, "PAGE", 16)
    monkeypatch.setattr(paged_cache, "PAGE", 16)
    with torch.inference_mode():
        yield names


def pipeline(
    folder: Path, cut: Mapping[str, tuple[int, int] | None], tokens: int = 500, precision: str = "dtype"
) -> list[Actor]:
    """Return the actors of a whole model, loaded on the second device."""
    checkpoint = open_checkpoint(folder)
    actors = []
    for name, layers in cut.items():
        actor = kinds.make(kinds.BUILT_IN[name].implementation, None)
        place(actor, str(GPU))
        actor.load(Context(
            "a.0", {}, lambda _: None, checkpoint, "float32", layers=layers, cache_tokens=tokens, device=str(GPU), precision=precision,
        ))  # fmt: skip
        actors.append(actor)
    return actors


def plain(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {port: value[port] if isinstance(value, Batch) else value for port, value in tensors.items()}


def begun(actors: Sequence[Actor], session: int, prompt: Sequence[int], **given: Any) -> None:
    for actor in actors:
        actor.open(SessionInfo(session, 0, len(prompt) + STEPS + 1, tuple(prompt), STEPS + 1, **given))


def stepped(actors: Sequence[Actor], rows: tuple[Row, ...], tokens: Sequence[int]) -> Mapping[str, Any]:
    tensors: Mapping[str, Any] = {"token": torch.tensor(tokens)}
    for actor in actors:
        tensors = actor.step(Batch(rows, tensors if actor is actors[0] else plain(tensors)))
    return tensors


def answers(actors: Sequence[Actor], **given: Any) -> dict[int, list[int]]:
    """Answer the prompts in shared steps. The late session's prompt shares a step with single tokens of the others."""
    texts: dict[int, list[int]] = {}
    for session, prompt in PROMPTS.items():
        begun(actors, session, prompt, **given)
        texts[session] = list(prompt)
    done = dict.fromkeys(PROMPTS, 0)
    for step in range(STEPS):
        if step == 2:
            for session, prompt in LATE.items():
                begun(actors, session, prompt, **given)
                texts[session], done[session] = list(prompt), 0
        rows = tuple(Row(session, 0, done[session], len(text) - done[session]) for session, text in texts.items())
        fresh = [token for session, text in texts.items() for token in text[done[session] :]]
        made = stepped(actors, rows, fresh)["sampled"]
        done = {session: len(text) for session, text in texts.items()}
        for row, token in zip(made.rows, made["sampled"].tolist(), strict=True):
            texts[row.session].append(token)
    return {session: text[len({**PROMPTS, **LATE}[session]) :] for session, text in texts.items()}


def made(family: str, tiny: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    return tiny(f"fused-{family}", family.partition("-")[0], **{**SIZES, **FAMILIES[family]})


def check(model: Any, found: Mapping[int, list[int]]) -> None:
    """Compare answers with the tokens that transformers finds likeliest."""
    for session, prompt in {**PROMPTS, **LATE}.items():
        best = model(torch.tensor([[*prompt, *found[session]]])).logits[0].argmax(-1).tolist()
        assert found[session] == best[len(prompt) - 1 : -1]


@pytest.mark.parametrize("cut", CUTS, ids="-".join)
def test_every_cut_gives_transformers_tokens(
    cut: Mapping[str, Any], launched: list[str], tiny: Callable[..., tuple[Path, Any]]
) -> None:
    """Compute single tokens by the kernels, prompts beside them by torch, and choose transformers' tokens."""
    folder, model = made("llama", tiny)
    with pretended():
        check(model, answers(pipeline(folder, cut)))
    layers, steps = SIZES["num_hidden_layers"], launched.count("attend") // SIZES["num_hidden_layers"]
    assert steps == STEPS - 1 and launched.count("down") == layers * steps
    assert launched.count("pick") == ("head" not in cut) * (steps - 1)  # one step also had a prompt


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_families_give_transformers_tokens(
    family: str, launched: list[str], tiny: Callable[..., tuple[Path, Any]]
) -> None:
    """Compute biases, norms of heads, windows and stretched positions."""
    folder, model = made(family, tiny)
    with pretended():
        check(model, answers(pipeline(folder, CUTS[0])))
    assert launched


@pytest.mark.parametrize(("precision", "rounded"), [("int8", in_8_bits), ("int4", in_4_bits)])
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2]], ids="-".join)
def test_matrices_of_fewer_bits(
    cut: Mapping[str, Any], precision: str, rounded: Callable[[torch.Tensor], Codes], launched: list[str],
    tiny: Callable[..., tuple[Path, Any]],
) -> None:  # fmt: skip
    """Hold matrices as codes, where their columns fill blocks, and choose the tokens of transformers with the numbers that these stand for."""
    folder, plain_model = made("mistral", tiny)
    model = copy.deepcopy(plain_model)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name and weight.shape[1] % 32 == 0:
            weight.data = Coded([rounded(weight.data)], torch.float32, "cpu").wide()
    with pretended():
        actors: Any = pipeline(folder, cut, precision=precision)
        held = sum(actor.held_bytes() for actor in actors)
        check(model, answers(actors))
    assert launched and held < sum(weight.nbytes for weight in model.parameters()) / 2


def test_many_rows_take_several_steps(
    monkeypatch: pytest.MonkeyPatch, launched: list[str], tiny: Callable[..., tuple[Path, Any]]
) -> None:
    """Split rows over steps when the kernels' tiles hold fewer."""
    monkeypatch.setattr(fused, "MOST_ROWS", 2)
    folder, model = made("llama", tiny)
    with pretended():
        check(model, answers(pipeline(folder, CUTS[0])))
    assert launched.count("pick") == 1 + 2


def test_sampling_is_the_processors(tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Draw the tokens that the same model draws through torch."""
    folder, _ = made("llama", tiny)
    sampling = Sampling(temperature=1.3, top_p=0.9, seed=5, repetition_penalty=1.2)
    with pretended():
        found = answers(pipeline(folder, CUTS[0]), sampling=sampling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "DTYPES", ())
        with pretended():
            assert found == answers(pipeline(folder, CUTS[0]), sampling=sampling)


@pytest.mark.parametrize("cut", [CUTS[0], CUTS[1]], ids="-".join)
def test_logits_and_their_logarithms_are_transformers(
    cut: Mapping[str, Any], tiny: Callable[..., tuple[Path, Any]]
) -> None:
    """Return the logits of single tokens, and the likeliest tokens with their log-probabilities, to who asks for them."""
    folder, model = made("llama", tiny)
    text, seen = list(PROMPTS[1]), []
    with pretended():
        actors = pipeline(folder, cut)
        begun(actors, 1, text, logits=True, logprobs=2)
        rows = (Row(1, 0, 0, len(text)),)
        for _ in range(STEPS):
            outputs = stepped(actors, rows, text[rows[0].position :])
            text.append(int(outputs["sampled"]["sampled"][0]))
            rows = (Row(1, 0, len(text) - 1, 1),)
            seen.append((outputs["logits"]["logits"][0], outputs["logprobs"]["logprobs"][0]))
    exact = model(torch.tensor([text])).logits[0, len(PROMPTS[1]) - 1 : -1]
    for expected, token, (logits, logprobs) in zip(exact, text[len(PROMPTS[1]) :], seen, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        chosen, first, second = logprobs.view(-1, 2)[:3].tolist()
        best = expected.log_softmax(-1).topk(2)
        assert (chosen[0], first[0], second[0]) == (token, *best.indices.tolist())
        assert (chosen[1], first[1], second[1]) == pytest.approx(
            (best.values[0].item(), *best.values.tolist()), abs=1e-4
        )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, with which the interpreter computes
def test_a_row_without_finite_logits_fails_alone(tiny: Callable[..., tuple[Path, Any]]) -> None:
    """End one session whose keys are not finite, and go on with the session beside it."""
    folder, _ = made("llama", tiny)
    with pretended():
        actors: Any = pipeline(folder, CUTS[0])
        for session in (1, 2):
            begun(actors, session, PROMPTS[2])
        rows = tuple(Row(session, 0, 0, 3) for session in (1, 2))
        first = stepped(actors, rows, [*PROMPTS[2], *PROMPTS[2]])["sampled"]["sampled"].tolist()
        cache, pool = actors[0].blocks.cache.sessions[1], actors[0].blocks.fused._pool
        pool.pages.values[1].own[cache.pages[0]] = float("nan")
        rows = tuple(Row(session, 0, 3, 1) for session in (1, 2))
        with pytest.raises(RowsFailed) as failed:
            stepped(actors, rows, first)
    assert [type(error) for error in failed.value.failures.values()] == [NotFinite]
    assert list(failed.value.failures) == [rows[0]]
    left: Any = failed.value.outputs["sampled"]
    assert [row.session for row in left.rows] == [2]


def test_a_watched_step_reports_tensors(tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Compute a watched step through torch, with the pages that the kernels have written."""
    folder, model = made("llama", tiny)
    text = [*PROMPTS[1]]
    seen: list[torch.Tensor] = []
    with pretended():
        actors: Any = pipeline(folder, CUTS[0])
        begun(actors, 1, text)
        rows = (Row(1, 0, 0, len(text)),)
        for _ in range(2):
            text.append(int(stepped(actors, rows, text[rows[0].position :])["sampled"]["sampled"][0]))
            rows = (Row(1, 0, len(text) - 1, 1),)
        actors[0].blocks.look = lambda layer, name, rows, tensor: (
            seen.append(tensor.cpu()) if name == "hidden" else None
        )
        actors[0].look = actors[0].blocks.look
        stepped(actors, rows, text[-1:])
    exact = model(torch.tensor([text]), output_hidden_states=True).hidden_states
    assert len(seen) == 2
    torch.testing.assert_close(seen[0][0], exact[1][0, -1], rtol=1e-4, atol=1e-4)


def test_pages_go_back_and_grow(tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Take all positions that were promised, also in many short sessions, and give each page to one session only."""
    folder, model = made("llama", tiny)
    with pretended():
        actors: Any = pipeline(folder, CUTS[0], tokens=96)
        pool = actors[0].blocks.fused._pool
        for _ in range(3):
            for session in range(9):
                begun(actors, session, PROMPTS[2])
            held = [page for cache in actors[0].blocks.cache.sessions.values() for page in cache.pages]
            assert len(set(held)) == len(held) == 9 <= pool.pages.count <= 12
            rows = tuple(Row(session, 0, 0, 3) for session in range(9))
            first = stepped(actors, rows, PROMPTS[2] * 9)["sampled"]["sampled"].tolist()
            rows = tuple(Row(session, 0, 3, 1) for session in range(9))
            second = stepped(actors, rows, first)["sampled"]["sampled"].tolist()
            for session in range(9):
                actors[0].close(session)
    best = model(torch.tensor([[*PROMPTS[2], first[0]]])).logits[0].argmax(-1).tolist()
    assert (first[0], second[0]) == (best[2], best[3]) and len(set(first)) == len(set(second)) == 1


def test_kernels_that_cannot_be_built(
    launched: list[str], tiny: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Compute through torch where Triton cannot build kernels, and say why."""

    def fails(_: fused.Fused) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused.Fused, "warm", fails)
    folder, model = made("llama", tiny)
    with pretended():
        check(model, answers(pipeline(folder, CUTS[1])))
    assert not launched and "cannot be built, so torch computes all: Failed to find C compiler" in caplog.text


@pytest.mark.parametrize("cut", CUTS, ids="-".join)
def test_a_token_that_does_not_exist(cut: Mapping[str, Any], tiny: Callable[..., tuple[Path, Any]]) -> None:
    """Refuse it, in a prompt and alone, before it can end the process; the session can go on."""
    folder, _ = made("llama", tiny)
    with pretended():
        actors = pipeline(folder, cut)
        begun(actors, 1, PROMPTS[2])
        for tokens, row in (((5, 96, 7), Row(1, 0, 0, 3)), ((-1,), Row(1, 0, 3, 1))):
            with pytest.raises(IndexError, match="token: expected ids from 0 to 95, got"):
                stepped(actors, (row,), tokens)
            stepped(actors, (row,), PROMPTS[2][: row.tokens])


def test_a_step_that_fails_half_way(tiny: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave each cache where it was, so that the rows of a failed step can be repeated alone."""
    folder, _ = made("llama", tiny)
    with pretended():
        actors: Any = pipeline(folder, CUTS[0])
        for session in (1, 2):
            begun(actors, session, PROMPTS[2])
        [token] = stepped(actors, (Row(1, 0, 0, 3),), PROMPTS[2])["sampled"]["sampled"].tolist()
        rows = (Row(1, 0, 3, 1), Row(2, 0, 0, 3))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(actors[0].blocks, "_by_torch", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stepped(actors, rows, [token, *PROMPTS[2]])
        made_first = stepped(actors, rows[:1], [token])["sampled"]["sampled"].tolist()
        assert stepped(actors, rows[1:], PROMPTS[2])["sampled"]["sampled"].tolist() == [token]
        assert len(made_first) == 1
