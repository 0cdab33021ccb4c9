"""Check encoder–decoder models: the layer groups of every family, streams over real processes, and bad graphs."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.actors.checkpoint import Checkpoint, open_checkpoint
from ranvier.actors.component.actor import Batch, Context
from ranvier.actors.component.kinds import BUILT_IN, load_class
from ranvier.actors.model.seq2seq import bucket
from ranvier.graph.trace import summary
from ranvier.transport.format.header import Row

T5 = {
    "vocab_size": 300, "d_model": 48, "d_kv": 10, "d_ff": 96, "num_layers": 4, "num_decoder_layers": 3, "num_heads": 6,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
}  # fmt: skip
BART = {
    "vocab_size": 300, "d_model": 48, "encoder_layers": 4, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 80, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5 gated, its head not scaled": (
        "t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("mt5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "marian": ("marian", {**BART, "activation_function": "swish", "scale_embedding": True}),
    "marian with two vocabularies": (
        "marian", {**BART, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 200},
    ),
    "bart": ("bart", BART),
    "pegasus": ("pegasus", {**BART, "scale_embedding": True, "activation_function": "relu"}),
    "mbart": ("mbart", BART),
}  # fmt: skip
Made = tuple[Path, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Provide `made(name)`, which returns a random checkpoint of a family, and the model that transformers loads."""
    there: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in there:
            from transformers import AutoConfig, AutoModelForSeq2SeqLM

            family, config = FAMILIES[name]
            torch.manual_seed(7)
            model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **config), dtype=torch.float32)
            with torch.no_grad():  # norms of ones and biases of zeros would hide an error
                for parameter_name, parameter in model.named_parameters():
                    if any(part in parameter_name for part in ("norm", "bias")):
                        parameter.add_(torch.randn_like(parameter) * 0.2)
                    elif family not in ("t5", "mt5") and "embed_positions" not in parameter_name:
                        parameter.mul_(4)
                for buffer_name, buffer in model.named_buffers():
                    if buffer_name == "final_logits_bias":
                        buffer.add_(torch.randn_like(buffer) * 0.5)
            folder = tmp_path_factory.mktemp("seq2seq")
            model.save_pretrained(folder)
            there[name] = folder, AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
        return there[name]

    return make


def expected(model: Any, source: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the logits after each token of the answer, [answer, V]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([source]), decoder_input_ids=torch.tensor([answer])).logits[0]
    return logits


def actors_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Load one actor of each part, and two for the layers, in this process."""
    actors = {}
    for name, kind, layers in (
        ("source", "encoder_embedding", None), ("enc1", "encoder", (0, 0)), ("enc2", "encoder", (1, 3)),
        ("embed", "embedding", None), ("dec1", "decoder", (0, 1)), ("dec2", "decoder", (2, 2)), ("head", "head", None),
    ):  # fmt: skip
        implementation = BUILT_IN[kind].seq2seq
        assert implementation is not None
        actors[name] = load_class(implementation, None)()
        actors[name].load(Context(name, {}, lambda _: None, checkpoint, "float32", layers, 200))
    return actors


@pytest.mark.parametrize("name", FAMILIES)
def test_the_groups_of_every_family_are_exact(name: str, made: Callable[[str], Made]) -> None:
    """Give transformers' logits in the layer groups of every family.

    Two sources of different length share a batch. Answers come in parts, then token by token, past every bucket."""
    folder, model = made(name)
    checkpoint = open_checkpoint(folder)
    actors = actors_of(checkpoint)
    rng = random.Random(3)
    vocab = checkpoint.config.vocab
    sources = {1: [rng.randrange(4, vocab) for _ in range(30)], 2: [rng.randrange(4, vocab) for _ in range(7)]}
    answers = {session: [3, *(rng.randrange(4, vocab) for _ in range(27))] for session in sources}
    for session in sources:
        info = ranvier.SessionInfo(session=session, epoch=1, capacity=80, log=(0,), max_tokens=99, logits=True)
        for actor in actors.values():
            actor.open(info)

    def step(names: Sequence[str], rows: tuple[Row, ...], port: str, value: Any) -> Any:
        outputs: Any = None
        for actor in names:
            outputs = actors[actor].step(Batch(rows, {port: value}))
            value, port = outputs.get("hidden"), "hidden"
        return outputs

    rows = tuple(Row(session, 1, 0, len(source)) for session, source in sources.items())
    tokens = torch.tensor([token for source in sources.values() for token in source])
    memory = step(("source", "enc1", "enc2"), rows, "prompt", tokens)["hidden"]
    for decoder in ("dec1", "dec2"):
        assert step((decoder,), rows, "memory", memory) == {}
    start = 0
    wanted = {session: expected(model, sources[session], answers[session]) for session in sources}
    for count in (1, 12, 1, 1, 10, 1, 1, 1):
        rows = tuple(Row(session, 1, start, count) for session in sources)
        tokens = torch.tensor([token for answer in answers.values() for token in answer[start : start + count]])
        outputs = step(("embed", "dec1", "dec2", "head"), rows, "token", tokens)
        start += count
        got = dict(zip(sources, outputs["logits"].tensors["logits"], strict=True))
        for session, logits in wanted.items():
            assert (got[session] - logits[start - 1]).abs().max() < 1e-4
    assert start == 28
    assert max(logits.abs().max() for logits in wanted.values()) > 0.5, "logits of nothing would agree, too"


def test_buckets_are_those_of_transformers() -> None:
    """Compute the buckets of relative positions as transformers does."""
    from transformers.models.t5.modeling_t5 import T5Attention

    behind = torch.arange(-300, 300)[None]
    for both_ways in (True, False):
        for buckets, distance in ((32, 128), (8, 20), (64, 256)):
            theirs = T5Attention._relative_position_bucket(behind, both_ways, buckets, distance)
            assert torch.equal(bucket(behind, both_ways, buckets, distance), theirs)


GRAPH: dict[str, Any] = {
    "model": {"source": "./model", "dtype": "float32"},
    "actors": {
        "source": {"kind": "encoder_embedding"},
        "begins_to_read": {"kind": "encoder", "layers": "0-1"},
        "reads": {"kind": "encoder", "layers": "2-3", "replicas": 2},
        "embed": {"kind": "embedding"},
        "begins": {"kind": "decoder", "layers": "0-1"},
        "ends": {"kind": "decoder", "layers": 2, "replicas": 2},
        "head": {"kind": "head"},
    },
    "edges": [
        "source.hidden -> begins_to_read.hidden", "begins_to_read.hidden -> reads.hidden",
        "reads.hidden -> begins.memory", "reads.hidden -> ends.memory",
        "embed.hidden -> begins.hidden", "begins.hidden -> ends.hidden", "ends.hidden -> head.hidden",
        {"from": "head.token", "to": "embed.token", "feedback": True},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_streams_over_real_processes_are_exact(
    name: str, made: Callable[[str], Made], graph_file: Callable[..., Path], runs: Path
) -> None:
    """Give transformers' tokens, and logits within 1e-4, in five streams at once.

    The encoder and the last decoder have two replicas. The prompt and its limits are those of the source."""
    folder, model = made(name)
    path = graph_file(**GRAPH)
    shutil.copytree(folder, path.parent / "model")
    graph = ranvier.load(path)
    rng = random.Random(5)
    sources = [[rng.randrange(4, 300) for _ in range(3 + 9 * number)] for number in range(5)]
    results: dict[int, tuple[ranvier.Result, torch.Tensor]] = {}

    async def stream(run: ranvier.Run, number: int) -> None:
        generation = run.generate(sources[number], max_tokens=16, stop_tokens=(), logits=True)
        logits = [torch.frombuffer(bytearray(t.logits), dtype=torch.float32) async for t in generation if t.logits]
        results[number] = generation.result, torch.stack(logits)

    async def main() -> Path:
        async with ranvier.launch(graph, runs=runs) as run:
            async with trio.open_nursery() as nursery:
                for number in range(len(sources)):
                    nursery.start_soon(stream, run, number)
            with pytest.raises(ranvier.RequestError, match="score is for causal ones"):
                await run.score([1, 2, 3])
            with pytest.raises(ranvier.RequestError, match="token 300 is not in the vocabulary of 300"):
                run.generate([300], max_tokens=1)
            if name == "marian":
                with pytest.raises(
                    ranvier.RequestError, match="max_tokens: expected 1 to the model's context of 64, got 65"
                ):
                    run.generate([5], max_tokens=65)
            return run.dir

    told = summary.summary(summary.read(trio.run(main)))
    start = FAMILIES[name][1]["decoder_start_token_id"]
    for number, (result, logits) in results.items():
        assert (result.prompt_tokens, len(result.token_ids)) == (len(sources[number]), 16)
        wanted = expected(model, sources[number], [start, *result.token_ids])[:-1]
        assert wanted.argmax(-1).tolist() == result.token_ids
        assert (logits - wanted).abs().max() < 1e-4
    messages = {edge["edge"]: edge["messages"] for edge in told["edges"]}
    assert messages["reads.hidden -> begins.memory"] <= 5, "the source is encoded once a stream"


def test_tokens_that_may_never_be_chosen(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Never sample a token of `bad_words_ids`, and leave the logits unchanged.

    Words of one token, such as marian's padding, are listed in generation_config.json."""
    folder, _ = made("marian")
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bad_words_ids": [[221], [5, 6]]}))
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.config.encoder is not None
    assert checkpoint.config.encoder.suppressed == (221,)
    head = actors_of(checkpoint)["head"]
    head.open(ranvier.SessionInfo(session=1, epoch=1, capacity=9, log=(0,), max_tokens=9, logits=True))
    hidden = head.weight_VH[221][None] * 9
    outputs = head.step(Batch((Row(1, 1, 0, 1),), {"hidden": hidden}))
    assert int(outputs["logits"].tensors["logits"][0].argmax()) == 221
    assert int(outputs["sampled"].tensors["sampled"][0]) != 221


def test_the_first_token_may_be_given(made: Callable[[str], Made], tmp_path: Path) -> None:
    """Generate `forced_bos_token_id` as the first token, whatever the logits are, and only there."""
    folder, _ = made("mbart")
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "forced_bos_token_id": 7}))
    head = actors_of(open_checkpoint(tmp_path / "model"))["head"]
    for session, position in ((1, 0), (2, 4)):
        log = tuple(range(position + 1))
        head.open(ranvier.SessionInfo(session=session, epoch=1, capacity=9, log=log, max_tokens=9, logits=True))
    rows = (Row(1, 1, 0, 1), Row(2, 1, 4, 1))
    outputs = head.step(Batch(rows, {"hidden": torch.randn(2, 48)}))
    first, later = outputs["sampled"].tensors["sampled"].tolist()
    likeliest = outputs["logits"].tensors["logits"].argmax(-1).tolist()
    assert first == 7 != likeliest[0]
    assert later == likeliest[1]


def test_t5_does_not_fit_into_float16(made: Callable[[str], Made], graph_file: Callable[..., Path]) -> None:
    """Refuse t5 in float16, whose range it exceeds."""
    path = graph_file(**{**GRAPH, "model": {"source": "./model", "dtype": "float16"}})
    shutil.copytree(made("t5")[0], path.parent / "model")
    with pytest.raises(ranvier.GraphError, match="t5 exceeds the range of float16; use bfloat16 or float32"):
        ranvier.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reads": {"kind": "encoder", "layers": "0-2"}}, "layers of the encoder missing: 3; add them to an actor"),
        ({"reads": {"kind": "encoder", "layers": "0-4"}}, "layers 0-4 are out of range; the model has 0-3"),
        ({"reads": {"kind": "blocks", "layers": "0-3"}}, "is an encoder–decoder; use encoder_embedding and encoder"),
        ({"begins": {"kind": "decoder", "layers": 0}}, "layers missing: 1; add them to an actor"),
        ({"edges": ["source.hidden -> begins.memory"]}, "memory comes from layer 3 of the encoder, not from source"),
        ({"edges": ["reads.hidden -> begins.hidden"]}, "reads belongs to the encoder, begins does not"),
        ({"edges": ["embed.hidden -> reads.hidden"]}, "embed belongs to the decoder, reads does not"),
        ({"edges": []}, "actor begins: input 'memory' is open"),
    ],
)
def test_what_does_not_fit(
    change: dict[str, Any], words: str, made: Callable[[str], Made], graph_file: Callable[..., Path]
) -> None:
    """Refuse a graph that does not fit the encoder–decoder model, and say why."""
    content = copy.deepcopy(GRAPH)
    edges = change.pop("edges", None) if "edges" in change else None
    if edges is not None:
        target = edges[0].split(" -> ")[1] if edges else "begins.memory"
        kept = [edge for edge in content["edges"] if not isinstance(edge, str) or not edge.endswith(target)]
        content["edges"] = [*kept, *edges]
    content["actors"] |= change
    path = graph_file(**content)
    shutil.copytree(made("t5")[0], path.parent / "model")
    with pytest.raises(ranvier.GraphError) as caught:
        ranvier.load(path)
    assert words in str(caught.value)


def test_a_causal_model_has_no_encoder(tiny: Any, graph_file: Callable[..., Path]) -> None:
    """Refuse an encoder for a causal model."""
    path = graph_file(**GRAPH)
    shutil.copytree(tiny("no encoder")[0], path.parent / "model")
    with pytest.raises(ranvier.GraphError, match=r"the model \(llama\) has no encoder; use embedding, blocks and head"):
        ranvier.load(path)
