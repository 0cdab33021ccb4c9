"""Compare packed weights and decoding steps in C with the same numbers in torch, with GGUF's own, and with transformers.

Each test runs with every instruction set that this processor has.
"""

from __future__ import annotations

import gc
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.checkpoint.checkpoint import Checkpoint
from ranvier.actors.component.actor import Actor, Batch, Context
from ranvier.actors.component.session import SessionInfo
from ranvier.actors.errors import CheckpointError, NotFinite
from ranvier.actors.model.blocks import Blocks
from ranvier.actors.model.experts import Attention, Combine, Experts
from ranvier.actors.model.kernels import native, packed
from ranvier.actors.model.kernels.packed import (
    BFLOAT16,
    INT4,
    INT8,
    Packed,
    pack_bfloat16,
    pack_int4,
    pack_int8,
    pack_stored,
    pack_whole,
    read_stored,
)
from ranvier.actors.model.sampling import NOWHERE, likeliest_of_each, make_sure_of
from ranvier.actors.model.seq2seq import Decoder, Encoder, EncoderEmbedding, Seq2SeqHead, SourceEmbedding
from ranvier.actors.model.tensors import finite
from ranvier.transport.format.header import Row

pytestmark = pytest.mark.skipif(not native.libraries(), reason="no compiler, or no AVX2")


@pytest.fixture(params=list(native.libraries()), autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute with one of the instruction sets; return its name."""
    name: str = request.param
    loaded = native.libraries()[name]
    loaded.ranvier_threads(torch.get_num_threads())
    monkeypatch.setattr(packed, "library", lambda: loaded)
    return name


def whole_tokens(count: int, columns: int) -> torch.Tensor:
    """Make tokens that rounding to int8 does not change: whole numbers, one of each 32 being 127."""
    tokens = torch.randint(-127, 128, (count, columns)).float()
    tokens[:, ::32] = 127
    return tokens


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 21])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (560, 576)])
def test_products_are_those_of_torch(rows: int, columns: int, count: int) -> None:
    """Multiply with any number of tokens: part of a round, whole rounds, and a rest. Only the order of adding differs."""
    torch.manual_seed(rows + count)
    narrow = torch.randn(rows, columns).bfloat16()
    tokens = torch.randn(count, columns).bfloat16().float()
    assert torch.allclose(pack_bfloat16(narrow).multiply(tokens), tokens @ narrow.float().T, atol=1e-3, rtol=1e-4)
    exact = whole_tokens(count, columns)
    scale = (torch.rand(rows, columns // 32) + 0.1).half().float()
    least = torch.randn(rows, columns // 32).half().float()
    wide = scale.repeat_interleave(32, 1)
    numbers = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    made = pack_whole(INT8, numbers, scale).multiply(exact)
    assert torch.allclose(made, exact @ ((numbers.float() - 128) * wide).T, rtol=1e-4, atol=1.0)
    nibbles = numbers & 15
    made = pack_whole(INT4, nibbles, scale, least).multiply(exact)
    assert torch.allclose(made, exact @ (nibbles * wide + least.repeat_interleave(32, 1)).T, rtol=1e-4, atol=1.0)


def test_rounding_costs_what_it_must() -> None:
    """Stay within the error of each kind: bfloat16 0.4 %, int8 1 %, int4 10 %; and take as few bytes as the kind says."""
    torch.manual_seed(1)
    weight, tokens = torch.randn(320, 640), torch.randn(5, 640)
    exact = tokens @ weight.T
    for pack, most, bits in ((pack_bfloat16, 0.004, 16), (pack_int8, 0.01, 8.5), (pack_int4, 0.1, 5)):
        packed = pack(weight)
        assert float((packed.multiply(tokens) - exact).norm() / exact.norm()) < most
        assert packed.nbytes == weight.numel() * bits / 8


@pytest.mark.parametrize("pack", [pack_bfloat16, pack_int8, pack_int4])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (560, 576), (64, 1536), (112, 3104)])
def test_a_token_s_bits_do_not_depend_on_the_tokens_beside_it(
    rows: int, columns: int, pack: Callable[[torch.Tensor], Packed]
) -> None:
    """Multiply the same tokens alone, a few together, and in hundreds; numbers near the smallest are among them."""
    torch.manual_seed(rows)
    weight = torch.randn(rows, columns) * torch.randn(rows, 1).exp()
    tokens = torch.randn(260, columns) * torch.randn(260, 1).exp()
    tokens[3] *= 1e-30
    tokens[5] *= 1e-38
    matrix = pack(weight)
    all_together = matrix.multiply(tokens)
    for count in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 64, 100, 256, 257):
        assert torch.equal(matrix.multiply(tokens[:count]), all_together[:count]), count
    assert torch.equal(matrix.multiply(tokens[5:6]), all_together[5:6])


def test_zeros_and_what_is_no_number() -> None:
    weight = torch.zeros(16, 32)
    for pack in (pack_bfloat16, pack_int8, pack_int4):
        assert pack(weight).multiply(torch.ones(2, 32)).abs().max() == 0
        assert pack(torch.ones(16, 32)).multiply(torch.zeros(3, 32)).abs().max() == 0
    assert pack_bfloat16(torch.ones(16, 32)).multiply(torch.full((1, 32), torch.nan)).isnan().all()


def gguf_checkpoint(path: Path, kind: str, numbers: np.ndarray[Any, Any]) -> Checkpoint:
    """Open a checkpoint of one matrix, written by the gguf package. Its config does not matter."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        ("block_count", 1), ("context_length", 64), ("embedding_length", 64), ("feed_forward_length", 64),
        ("head_count", 2), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-5), ("vocab_size", 16),
    ):  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    stored = GGMLQuantizationType[kind]
    writer.add_tensor("blk.0.attn_q.weight", quantize(numbers, stored), raw_dtype=stored)
    writer.add_tensor("blk.0.ffn_down.weight", quantize(numbers, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_what_gguf_holds_is_kept_as_it_is(kind: str, name: str, tmp_path: Path) -> None:
    """Keep the numbers of the file, as the gguf package reads them, and the rows of q in transformers' order.

    They are multiplied, looked up row by row, and rounded to bfloat16.
    """
    rng = np.random.default_rng(3)
    numbers = rng.standard_normal((64, 64), dtype=np.float32)
    checkpoint = gguf_checkpoint(tmp_path / "model.gguf", kind, numbers)
    stored = checkpoint.stored_rows(f"model.layers.0.{name}.weight", (64, 64))
    packed = pack_stored([stored, stored], INT8 if kind == "Q8_0" else INT4)
    expected = torch.from_numpy(dequantize(quantize(numbers, GGMLQuantizationType[kind]), GGMLQuantizationType[kind]))
    if "q_proj" in name:  # two heads of 32: pairs go back to halves
        expected = expected.view(2, 16, 2, 64).transpose(1, 2).reshape(64, 64)
    both = torch.cat((expected, expected))
    tokens = whole_tokens(4, 64)
    assert torch.allclose(packed.multiply(tokens), tokens @ both.T, rtol=1e-4, atol=0.05)
    index = torch.tensor([0, 63, 64, 17, 100, 17])
    assert torch.equal(packed.rows(index, torch.float32), both[index])
    assert torch.equal(pack_stored([stored, stored], BFLOAT16).rows(index, torch.bfloat16), both[index].bfloat16())
    assert torch.equal(read_stored(stored), expected.bfloat16())


def test_a_file_that_ends_within_a_matrix(tmp_path: Path) -> None:
    """Raise an error, not a signal, if a mapped file is too short (case 31)."""
    rng = np.random.default_rng(3)
    checkpoint = gguf_checkpoint(tmp_path / "model.gguf", "Q4_1", rng.standard_normal((64, 64), dtype=np.float32))
    size = (tmp_path / "model.gguf").stat().st_size
    os.truncate(tmp_path / "model.gguf", size - 1000)
    with pytest.raises(CheckpointError, match=r"ffn_down|down_proj.*truncated"):
        checkpoint.stored_rows("model.layers.0.mlp.down_proj.weight", (64, 64))


CONFIGS = [
    ("llama", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("mistral", {"sliding_window": 11}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}}),
    ("qwen3", {}),
    (
        "gemma3_text",
        {
            "sliding_window": 9,
            "query_pre_attn_scalar": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    ("gpt2", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
]
SIZES = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip


GPT2 = {
    "vocab_size": 320, "n_embd": 128, "n_inner": 192, "n_layer": 3, "n_head": 4, "n_positions": 256,
    "initializer_range": 0.1,
}  # fmt: skip


def hidden_after(oracle: Any, hidden_PH: torch.Tensor) -> torch.Tensor:
    """Return what transformers' layers make of these hidden states, before the final norm."""
    kept = []
    layers = oracle.transformer.h if hasattr(oracle, "transformer") else oracle.model.layers
    if hasattr(oracle, "transformer"):  # it adds the positions to what it is given
        hidden_PH = hidden_PH - oracle.transformer.wpe.weight[: len(hidden_PH)]
    handle = layers[-1].register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.inference_mode():
        oracle(inputs_embeds=hidden_PH[None])
    handle.remove()
    made = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    result: torch.Tensor = made[0] if made.dim() == 3 else made
    return result


@pytest.mark.parametrize(("family", "changes"), CONFIGS)
@pytest.mark.parametrize(("precision", "mean"), [("dtype", 0.01), ("int8", 0.03)])
def test_steps_are_those_of_transformers(
    family: str, changes: dict[str, Any], precision: str, mean: float, tiny: Any, request: pytest.FixtureRequest
) -> None:
    """Stay as near to transformers in float32 as rounding to bfloat16 (or 8 bits) explains.

    Two sessions of unequal length take a prompt each, in parts and beside the other's tokens, and then single tokens, past
    every window.
    """
    name = f"kernels {family} {sorted(changes)}"
    folder, oracle = tiny(name, family, **{**(GPT2 if family == "gpt2" else SIZES), **changes})
    blocks = Blocks(open_checkpoint(folder), (0, 2), torch.bfloat16, 500, lambda _: None, precision)
    assert isinstance(blocks.blocks[0].qkv, Packed)
    assert blocks._compiled is not None
    torch.manual_seed(5)
    given = {1: torch.randn(40, 128).bfloat16(), 2: torch.randn(31, 128).bfloat16()}
    expected = {session: hidden_after(oracle, hidden.float()) for session, hidden in given.items()}
    for session in given:
        blocks.open(SessionInfo(session, 1, 60))
    steps = [(13, 0), (1, 4), (0, 1), *[(1, 1)] * 26]  # tokens of each session
    errors = []
    for counts in steps:
        rows = tuple(
            Row(session, 1, blocks.cache.sessions[session].length, count)
            for session, count in zip(given, counts, strict=True)
            if count
        )
        parts = {row.session: slice(row.position, row.position + row.tokens) for row in rows}
        made = blocks.forward(rows, torch.cat([given[session][part] for session, part in parts.items()]))
        wanted = torch.cat([expected[session][part] for session, part in parts.items()])
        errors += ((made.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).tolist()
    assert sum(errors) / len(errors) < mean
    assert max(errors) < 2 * mean
    assert [cache.length for cache in blocks.cache.sessions.values()] == [40, 31]


@pytest.mark.parametrize(("precision", "mean"), [("dtype", 0.01), ("int8", 0.03)])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_mixture_of_experts_is_that_of_transformers(family: str, precision: str, mean: float, tiny: Any) -> None:
    """Let attention, experts and a shared expert go through the kernels, a prompt and then single tokens."""
    choices = {"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4, "decoder_sparse_step": 1}
    more = {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 160} if family == "qwen2_moe" else {}
    sizes = {**SIZES, "num_hidden_layers": 1, "num_experts_per_tok": 2}
    folder, oracle = tiny(f"kernels {family}", family, **sizes, **choices, **more)
    checkpoint = open_checkpoint(folder)
    attention, experts, combine = Attention(), Experts(), Combine()
    for actor in (attention, experts, combine):
        actor.load(
            Context("a", {}, lambda _: None, checkpoint, "bfloat16", (0, 0), 500, experts=(0, 3), precision=precision)
        )
    assert attention.layer._compiled is not None
    assert all(isinstance(matrix, Packed) for held in experts.held.values() for matrix in held.values())
    torch.manual_seed(5)
    given = torch.randn(40, 128).bfloat16()
    wanted = hidden_after(oracle, given.float())
    attention.open(SessionInfo(1, 1, 60))
    made = []
    for first, last in itertools.pairwise([0, 23, *range(24, 41)]):
        rows = (Row(1, 1, first, last - first),)
        parts = attention.step(Batch(rows, {"hidden": given[first:last]}))
        own = {port: part.rows for port, part in parts.items() if isinstance(part, Batch)}
        tensors = {port: part[port] if isinstance(part, Batch) else part for port, part in parts.items()}
        answers = experts.step(Batch(rows, tensors, own))
        tensors |= {port: part[port] for port, part in answers.items() if isinstance(part, Batch)}
        made.append(combine.step(Batch(rows, tensors))["hidden"])
    errors = (torch.cat(made).float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    # a token whose router hardly prefers one expert may go to another one than in float32
    assert float(errors.median()) < mean
    assert float((errors > 2 * mean).float().mean()) < 0.1


SIDES = {
    "t5": {
        "vocab_size": 320, "d_model": 64, "d_kv": 32, "num_heads": 2, "d_ff": 96, "num_layers": 2,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "bart": {
        "vocab_size": 320, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize(("precision", "most"), [("dtype", 0.02), ("int8", 0.04)])
@pytest.mark.parametrize("family", SIDES)
def test_an_encoder_decoder_is_that_of_transformers(family: str, precision: str, most: float, tmp_path: Path) -> None:
    """Multiply by packed matrices on both sides and in the head: a source, then the decoder's tokens one by one."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(7)
    oracle = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **SIDES[family])).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    oracle.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    source, target = torch.randint(3, 320, (17,)), torch.randint(3, 320, (9,))
    with torch.inference_mode():
        wanted = oracle(input_ids=source[None], decoder_input_ids=target[None]).logits[0]

    def loaded(actor: Any, layers: tuple[int, int] | None) -> Any:
        actor.load(Context("a", {}, lambda _: None, checkpoint, "bfloat16", layers, 500, precision=precision))
        return actor

    read, encoder = loaded(EncoderEmbedding(), None), loaded(Encoder(), (0, 1))
    embed, decoder, head = loaded(SourceEmbedding(), None), loaded(Decoder(), (0, 1)), loaded(Seq2SeqHead(), None)
    for layer in (*encoder.stack.layers, *decoder.stack.layers):
        assert all(isinstance(matrix, Packed) for matrix in layer._matrices.values())
    assert isinstance(head.weight_VH, Packed)
    row = Row(1, 1, 0, 17)
    given = Batch((row,), read.step(Batch((row,), {"prompt": source})))
    decoder.open(SessionInfo(1, 1, 60))
    decoder.step(Batch((row,), {"memory": encoder.step(given)["hidden"]}))
    made = []
    for position in range(9):
        rows = (Row(1, 1, position, 1),)
        made.append(head.logits(decoder.forward(rows, embed.forward(rows, target[position : position + 1]))))
    assert float((torch.cat(made) - wanted).norm() / wanted.norm()) < most


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu", "relu"])
def test_activations_are_those_of_torch(activation: str, tiny: Any) -> None:
    """Compare a layer whose attention does nothing, over small and very large numbers."""
    folder, oracle = tiny(f"kernels {activation}", **{**SIZES, "num_hidden_layers": 1, "hidden_act": activation})
    with torch.no_grad():
        oracle.model.layers[0].self_attn.o_proj.weight.zero_()
        oracle.model.layers[0].mlp.gate_proj.weight.mul_(torch.logspace(-3, 2, 192)[:, None])
    oracle.save_pretrained(folder)
    blocks = Blocks(open_checkpoint(folder), (0, 0), torch.bfloat16, 500, lambda _: None)
    assert blocks._compiled is not None
    blocks.open(SessionInfo(1, 1, 60))
    given = torch.randn(40, 128).bfloat16()
    made, wanted = blocks.forward((Row(1, 1, 0, 40),), given), hidden_after(oracle, given.float())
    assert float((made.float() - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("count", [1, 15, 16, 63, 64, 65, 1000, 4096, 9000])
def test_the_largest_number_is_the_first_one(count: int) -> None:
    """Find the largest logit as torch does: the first of several, NaN before all others."""
    kernels = packed.library()
    for seed in range(40):
        torch.manual_seed(seed)
        logits = torch.randn(count).round(decimals=seed % 3)
        if seed % 4 == 0:
            logits[torch.randint(count, (2,))] = float("-inf")
        if seed % 5 == 0:
            logits[torch.randint(count, (2,))] = float("nan")
        if seed == 7:
            logits[:] = float("-inf")
        largest = logits.isnan() if bool(logits.isnan().any()) else logits == logits.max()
        assert kernels.ranvier_largest(logits.data_ptr(), count) == int(largest.int().argmax())


@pytest.mark.parametrize("rows", [1, 2, 19])
def test_the_likeliest_token_of_each_row(rows: int) -> None:
    """Find the token of every row, and say which rows have no finite number as their largest."""
    for seed in range(20):
        torch.manual_seed(seed)
        logits_RV = torch.randn(rows, 4100).round(decimals=1 + seed % 3)
        row = seed % rows
        logits_RV[row, 4098] = (float("inf"), float("nan"), float("-inf"), 0.5)[seed % 4]
        wanted = logits_RV.argmax(-1).tolist()
        if seed % 4 < 2:
            wanted[row] = NOWHERE
        found = likeliest_of_each(logits_RV)
        assert found == wanted
        if seed % 4 < 2:
            with pytest.raises(NotFinite, match=f"expected finite numbers, got {logits_RV[row, 4098]:g}"):
                make_sure_of(found[row], logits_RV, row)
    logits_RV = torch.full((rows, 70), float("-inf"))
    assert likeliest_of_each(logits_RV) == [NOWHERE] * rows


@pytest.mark.parametrize("count", [1, 15, 63, 64, 65, 1000])
def test_the_largest_of_the_allowed_numbers(count: int) -> None:
    """Find the largest logit whose bit is set, as torch does with the others at -inf; -1 if no bit is set."""
    kernels = packed.library()
    for seed in range(40):
        torch.manual_seed(seed)
        logits, allowed = torch.randn(count).round(decimals=seed % 3), torch.rand(count) < (seed % 8) / 7
        if seed % 5 == 0:
            logits[torch.randint(count, (2,))] = float("nan")
        bits = np.packbits(allowed.numpy(), bitorder="little").tobytes()
        found = kernels.ranvier_largest_allowed(logits.data_ptr(), count, bits)
        expected = int(logits.masked_fill(~allowed, float("-inf")).argmax()) if bool(allowed.any()) else -1
        assert found == expected


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("chunk", [150, 64, 29, 7])
@pytest.mark.parametrize(
    ("precision", "fast", "mean"), [("dtype", False, 0.01), ("dtype", True, 0.01), ("int8", True, 0.03)]
)
def test_a_long_prompt_in_parts_is_that_of_transformers(
    window: int | None, chunk: int, precision: str, fast: bool, mean: float, tiny: Any
) -> None:
    """Attend to many tiles of positions, in spans that end anywhere, with eight query heads on two of keys and values."""
    changes = {"sliding_window": window, "num_attention_heads": 8}
    folder, oracle = tiny(f"kernels long {window}", "mistral", **{**SIZES, **changes})
    blocks = Blocks(open_checkpoint(folder), (0, 2), torch.bfloat16, 500, lambda _: None, precision, fast)
    torch.manual_seed(6)
    given = torch.randn(150, 128).bfloat16()
    expected = hidden_after(oracle, given.float())
    blocks.open(SessionInfo(1, 1, 151))
    made = torch.cat([
        blocks.forward((Row(1, 1, start, len(given[start : start + chunk])),), given[start : start + chunk])
        for start in range(0, 150, chunk)
    ])  # fmt: skip
    errors = (made.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.mean()) < mean
    assert float(errors.max()) < 2 * mean


@pytest.mark.parametrize("precision", ["dtype", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_attention_heads": 16, "num_key_value_heads": 1}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 96}),
        ("mistral", {"sliding_window": 77}),
        ("mistral", {"sliding_window": 300}),
    ],
)
def test_a_prompt_s_bits_do_not_depend_on_how_it_is_cut(
    family: str, changes: dict[str, Any], precision: str, tiny: Any
) -> None:
    """Compute a prompt of three blocks of positions at once, in parts of any size, and beside other sessions."""
    folder, _ = tiny(f"kernels cut {family} {changes}", family, **{**SIZES, "max_position_embeddings": 1024, **changes})
    blocks = Blocks(open_checkpoint(folder), (0, 2), torch.bfloat16, 4000, lambda _: None, precision)
    assert blocks._compiled is not None
    torch.manual_seed(7)
    given, other = torch.randn(601, 128).bfloat16(), torch.randn(40, 128).bfloat16()

    def made(*parts: int, beside: int = 0) -> torch.Tensor:
        for session in (1, 2):
            blocks.open(SessionInfo(session, 1, 700))
        start, results = 0, []
        for part in parts:
            rows, hidden = [Row(1, 1, start, part)], [given[start : start + part]]
            if beside and start < len(other):
                rows.insert(0, Row(2, 1, start, beside))
                hidden.insert(0, other[start : start + beside])
            results.append(blocks.forward(tuple(rows), torch.cat(hidden))[-part:])
            start += part
        return torch.cat(results)

    whole = made(601)
    for parts in ((256, 256, 89), (255, 2, 344), (1, 7, 33, 64, 200, 296), (300, *[1] * 20, 281), (599, 1, 1)):
        assert torch.equal(made(*parts), whole), parts
    assert torch.equal(made(10, 10, 10, 10, 561, beside=10), whole)


def test_what_lies_behind_the_last_position_is_never_used(tiny: Any) -> None:
    """Fill the memory of a cache with what is no number, and get the same."""
    folder, _ = tiny("kernels behind", "llama", **SIZES)
    blocks = Blocks(open_checkpoint(folder), (0, 2), torch.bfloat16, 500, lambda _: None)
    torch.manual_seed(8)
    given = torch.randn(39, 128).bfloat16()
    made = []
    for filled in (0, 255):  # all ones are NaN
        blocks.open(SessionInfo(1, 1, 60))
        blocks.cache.sessions[1].blocks.fill_(filled)
        made.append(torch.cat([
            blocks.forward((Row(1, 1, start, end - start),), given[start:end])
            for start, end in ((0, 13), (13, 14), (14, 15), (15, 38), (38, 39))
        ]))  # fmt: skip
    assert torch.equal(*made)
    assert made[0].isfinite().all()


def test_memory_of_closed_sessions_goes_back_to_the_system(tiny: Any) -> None:
    """Take memory for a session only where positions are written, and give all of it back when the session closes."""
    folder, _ = tiny("kernels memory", "llama", **{**SIZES, "max_position_embeddings": 4096})
    blocks = Blocks(open_checkpoint(folder), (0, 2), torch.bfloat16, 1 << 20, lambda _: None)

    def resident() -> int:
        """Return the bytes of this process's own memory."""
        rollup = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * int(re.findall(r"^Anonymous: *(\d+) kB", rollup, re.MULTILINE)[0])

    given = torch.randn(600, 128).bfloat16()

    def used_by(sessions: int) -> int:
        """Return the memory of a process with so many sessions of 600 positions, before they close."""
        for session in range(sessions):
            blocks.open(SessionInfo(session, 1, 4000))
            blocks.forward((Row(session, 1, 0, 600),), given)
        used = resident()
        for session in range(sessions):
            blocks.cache.close(session)
        return used

    used_by(2)  # makes the workspaces
    gc.collect()  # what earlier tests have left must not be given back in between
    before = resident()
    held = used_by(100) - before
    position = 3 * 2 * 2 * 32 * 2  # bytes of one position: layers, heads, keys and values, width, bfloat16
    assert 100 * 600 * position < held < 100 * 4000 * position  # large pages take a little more than is written
    assert resident() - before < held / 4


def test_three_threads_do_what_one_does(instruction_set: str, tiny: Any) -> None:
    """Give the same products to the last bit, a thousand times. Threads live as long as their process, so it is a new one."""
    import subprocess
    import sys

    code = """
import pathlib, sys
import torch
from ranvier.actors.model.kernels import native, packed
torch.manual_seed(1)
weight, tokens = torch.randn(1600, 64), torch.randn(3, 64)
chosen = native.libraries()[sys.argv[1]]
packed.library = lambda: chosen
matrices = [packed.pack_int8(weight), packed.pack_bfloat16(weight)]
from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.component.actor import Batch, Context
from ranvier.actors.component.session import SessionInfo
from ranvier.actors.model.blocks import Blocks
from ranvier.actors.model.experts import Attention, Combine, Experts
from ranvier.transport.format.header import Row
blocks = Blocks(open_checkpoint(pathlib.Path(sys.argv[2])), (0, 2), torch.bfloat16, 3000, lambda _: None)
given = torch.randn(900, 128).bfloat16()
def attended():
    blocks.open(SessionInfo(1, 1, 1000))  # a long cache, whose blocks the threads share
    made = [blocks.forward((Row(1, 1, 0, 880),), given[:880])]
    return torch.cat(made + [blocks.forward((Row(1, 1, i, 1),), given[i : i + 1]) for i in range(880, 900)])
alone, attended_alone = [matrix.multiply(tokens) for matrix in matrices], attended()
chosen.ranvier_threads(3)
for matrix, expected in zip(matrices, alone):
    assert all(torch.equal(matrix.multiply(tokens), expected) for _ in range(1000))
assert all(torch.equal(attended(), attended_alone) for _ in range(5))
print("same")
"""
    folder, _ = tiny("kernels threads", "llama", **{**SIZES, "max_position_embeddings": 1024})
    done = subprocess.run(
        [sys.executable, "-c", code, instruction_set, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "same\n", done.stderr


def test_a_transposed_matrix_is_rounded_like_any_other(tiny: Any) -> None:
    """Hold the matrices of gpt2, which its file has transposed, as int8 with `weights: int8`."""
    sizes = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    folder, _ = tiny("kernels gpt2", "gpt2", **sizes)
    checkpoint = open_checkpoint(folder)
    rounded, narrow = (Blocks(checkpoint, (0, 1), torch.bfloat16, 64, lambda _: None, how) for how in ("int8", "dtype"))
    tokens = torch.randn(3, 64).bfloat16()
    for one, other in zip(rounded.blocks, narrow.blocks, strict=True):
        assert isinstance(one.up, Packed)
        assert isinstance(other.up, Packed)
        assert (one.up.kind, other.up.kind) == (INT8, BFLOAT16)
        exact = other.up.multiply(tokens.float())
        assert float((one.up.multiply(tokens.float()) - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 576, 5001])
def test_one_number_that_is_not_finite_is_found(count: int, dtype: torch.dtype) -> None:
    """Find NaN and both infinities wherever they are, and take the largest and the smallest numbers as finite."""
    tokens = torch.randn(count).to(dtype)
    tokens[0], tokens[-1] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    finite(Actor(), "hidden", tokens)
    for wrong in (float("nan"), float("inf"), float("-inf")):
        for place in {0, count // 2, count - 1}:
            other = tokens.clone()
            other[place] = wrong
            with pytest.raises(NotFinite, match=f"hidden: expected finite numbers, got {wrong}"):
                finite(Actor(), "hidden", other)
