"""Give transformers' tokens for every type of model, whole and cut in two: tiny random checkpoints, float32, greedy.

The actors run in this process, one after the other, as a graph would send them their messages; `test_exact.py` runs models in
real processes. The slow tests try all types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from second_device import GPU, pretended

import ranvier
from ranvier.actors.checkpoint import Checkpoint, open_checkpoint
from ranvier.actors.component.actor import Batch, Context
from ranvier.actors.component.devices import CPU, place
from ranvier.actors.component.kinds import BUILT_IN, load_class
from ranvier.transport.format.header import Row

COUNT = 24
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 300,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
          "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
          "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}  # fmt: skip
STATES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8}
T5 = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "eos_token_id": 2,
      "pad_token_id": 0}  # fmt: skip
BART = {"vocab_size": 300, "d_model": 64, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 80, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
        "forced_eos_token_id": None}  # fmt: skip


def sized(*types: str, **more: Any) -> dict[str, Any]:
    """Return a config; `types` are the types of its layers, if they differ."""
    layers = {"layer_types": list(types), "num_hidden_layers": len(types)} if types else {}
    return {**SIZES, **layers, **more}


CAUSAL: dict[str, dict[str, Any]] = {
    "llama": sized(), "mistral": sized(sliding_window=None), "qwen2": sized(), "qwen3": sized(head_dim=16),
    "gemma3_text": sized(SLIDING, FULL, SLIDING, FULL, head_dim=16, sliding_window=24, query_pre_attn_scalar=16),
    "gpt2": GPT2,
    "mixtral": sized(**EXPERTS), "qwen2_moe": sized(**EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_moe": sized(**EXPERTS, head_dim=16),
    "gemma": sized(head_dim=16), "gemma2": sized(head_dim=16, num_hidden_layers=4, sliding_window=24, query_pre_attn_scalar=16),
    "gpt_neo": {"vocab_size": 300, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "window_size": 24,
                "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 512, "intermediate_size": 96,
                "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": sized(), "gptj": {**GPT2, "rotary_dim": 8}, "gpt_bigcode": GPT2, "codegen": {**GPT2, "rotary_dim": 8},
    "opt": sized(ffn_dim=96, word_embed_proj_dim=64, dropout=0.0),
    "bloom": {"vocab_size": 300, "hidden_size": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "falcon": sized(new_decoder_architecture=True, num_kv_heads=2),
    "mpt": {"vocab_size": 300, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512, "expansion_ratio": 2},
    "phi": sized(), "phi3": sized(), "phimoe": sized(**EXPERTS), "starcoder2": sized(), "stablelm": sized(qk_layernorm=True),
    "olmo": sized(clip_qkv=8.0), "olmo2": sized(), "olmo3": sized(SLIDING, SLIDING, FULL, SLIDING, sliding_window=24),
    "olmoe": sized(**EXPERTS), "cohere": sized(use_qk_norm=True),
    "cohere2": sized(SLIDING, FULL, SLIDING, FULL, head_dim=16, sliding_window=24),
    "granite": sized(embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0, attention_multiplier=0.2),
    "granitemoe": sized(**EXPERTS, embedding_multiplier=3.0),
    "deepseek_v2": sized(**LATENT, topk_method="group_limited_greedy"), "deepseek_v3": sized(**LATENT),
    "smollm3": sized(no_rope_layers=[1, 0, 1]), "persimmon": sized(), "nemotron": sized(), "glm": sized(head_dim=16),
    "glm4": sized(head_dim=16), "ernie4_5": sized(head_dim=16), "helium": sized(head_dim=16),
    "hunyuan_v1_dense": sized(head_dim=16), "seed_oss": sized(head_dim=16), "arcee": sized(), "apertus": sized(),
    "exaone4": sized(SLIDING, FULL, SLIDING, FULL, head_dim=16, sliding_window=24, sliding_window_pattern=2),
    "gpt_oss": sized(SLIDING, FULL, SLIDING, FULL, **EXPERTS, head_dim=16, sliding_window=24),
    "xglm": {"vocab_size": 300, "d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4,
             "max_position_embeddings": 512},
    "minimax_m2": sized(**EXPERTS, head_dim=16),
    # these cannot be cut: their layers keep other states
    "mamba": {**STATES, "state_size": 8},
    "mamba2": {**STATES, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "jamba": sized(**EXPERTS, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                   expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False),
    "bamba": sized(**MAMBA, num_hidden_layers=4, attn_layer_indices=[1, 3]),
    "granitemoehybrid": sized("mamba", "attention", **EXPERTS, **MAMBA, shared_intermediate_size=32),
    "lfm2": sized("conv", FULL, "conv", FULL, block_ff_dim=96, conv_L_cache=3),
    "rwkv": {**STATES, "attention_hidden_size": 64, "intermediate_size": 96, "context_length": 512},
    "qwen3_next": sized(LINEAR, FULL, LINEAR, FULL, **EXPERTS, head_dim=16, shared_expert_intermediate_size=32,
                        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16),
    "minimax": sized(FULL, LINEAR, FULL, LINEAR, **EXPERTS, block_size=8),
    "openai-gpt": {**GPT2, "afn": "gelu"},
}  # fmt: skip
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": T5, "mt5": {**T5, "feed_forward_proj": "gated-gelu"}, "bart": BART, "mbart": BART, "mvp": BART,
    "marian": {**BART, "scale_embedding": True}, "pegasus": {**BART, "scale_embedding": True},
    "plbart": {**BART, "scale_embedding": True},
}  # fmt: skip
TYPES = (*CAUSAL, *SEQ2SEQ)
QUICK = (
    "llama", "gemma3_text", "gpt2", "mixtral", "gemma2", "gpt_neox", "bloom", "falcon", "phi3",
    "cohere2", "deepseek_v3", "gpt_oss", "mamba2", "lfm2", "minimax", "openai-gpt", "t5",
    "plbart",
)  # fmt: skip
"""Types that the quick tests try, too: each kind of positions, of feed-forward part, and of state once."""
ON_A_DEVICE = ("qwen2_moe", "mamba2", "t5", "plbart")
"""Types that the quick tests try on a second device: experts, a state that is no cache, and encoder–decoders."""


def model_of(name: str, folder: Path) -> Any:
    """Write a checkpoint whose weights, norms, biases and buffers are all random, and return its model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(len(name))
    config = AutoConfig.for_model(name, **{**CAUSAL, **SEQ2SEQ}[name])
    auto = AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    parameters = {each.data_ptr(): (key, each) for key, each in model.named_parameters()}
    with torch.no_grad():
        for key, parameter in parameters.values():
            if parameter.dim() < 2 or "A_log" in key or "dt_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed_positions" not in key or name not in ("marian", "pegasus"):  # those are sinusoids
                torch.nn.init.normal_(parameter, std=0.1 if name in ("t5", "mt5") else 0.25)
        for tensor in model.state_dict().values():
            if tensor.data_ptr() not in parameters and tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(folder)
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def by_transformers(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Return tokens and logits of the library's `generate`."""
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    made = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=COUNT,
        do_sample=False, num_beams=1, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return [int(token) for token in made.sequences[0, -COUNT:]], torch.cat(made.logits)


class Actors:
    """Run the actors of a graph in this process."""

    def __init__(
        self, checkpoint: Checkpoint, plan: list[tuple[str, str, tuple[int, int] | None]], device: str = CPU
    ) -> None:
        self._config = checkpoint.config
        self._actors = {}
        for name, kind_name, layers in plan:
            kind = BUILT_IN[kind_name]
            own = checkpoint.config.runs(blocks=kind.holds_blocks)
            implementation = kind.implementation if own else kind.foreign
            if checkpoint.config.encoder is not None:
                implementation = kind.seq2seq or kind.implementation
            assert implementation is not None
            self._actors[name] = load_class(implementation, None)()
            place(self._actors[name], device)
            context = Context(name, {}, lambda _: None, checkpoint, "float32", layers, 600, device=device)
            self._actors[name].load(context)

    def _through(self, names: list[str], row: Row, port: str, value: Any) -> Any:
        for name in names:
            made = self._actors[name].step(Batch((row,), {port: value}))
            value, port = made.get("hidden"), "hidden"
            value = value.tensors["hidden"] if isinstance(value, Batch) else value
        return made

    def generate(self, prompt: list[int], chunk: int) -> tuple[list[int], torch.Tensor]:
        names, tokens = list(self._actors), list(prompt)
        if self._config.encoder is not None:
            tokens = [self._config.encoder.start_token]
        info = ranvier.SessionInfo(
            session=1, epoch=1, capacity=len(tokens) + COUNT, log=tuple(tokens), max_tokens=COUNT, logits=True
        )
        for actor in self._actors.values():
            actor.open(info)
        if self._config.encoder is not None:
            row = Row(1, 1, 0, len(prompt))
            memory = self._through(names[:3], row, "prompt", torch.tensor(prompt))["hidden"]
            memory = memory.tensors["hidden"] if isinstance(memory, Batch) else memory
            for name in ("lower", "upper"):
                self._actors[name].step(Batch((row,), {"memory": memory}))
            names = names[3:]
        at, generated, logits = 0, [], []
        while len(generated) < COUNT:
            part = tokens[at : at + chunk]
            made = self._through(names, Row(1, 1, at, len(part)), "token", torch.tensor(part))
            at += len(part)
            if "sampled" in made:
                generated.append(int(made["sampled"].tensors["sampled"][0]))
                logits.append(made["logits"].tensors["logits"][0].clone())
                tokens.append(generated[-1])
        return generated, torch.stack(logits)


def plans(checkpoint: Checkpoint) -> list[list[tuple[str, str, tuple[int, int] | None]]]:
    """Return the graphs to try: whole, and cut in two if the model can be cut."""
    config = checkpoint.config
    last = config.layers - 1
    if config.encoder is not None:
        return [
            [("source", "encoder_embedding", None), ("first", "encoder", (0, 0)),
             ("second", "encoder", (1, config.encoder.layers - 1)), ("embed", "embedding", None), ("lower", "decoder", (0, 0)),
             ("upper", "decoder", (1, last)), ("head", "head", None)]
        ]  # fmt: skip
    whole = [("all", "model", (0, last))]
    return [whole] if config.uncut else [whole, [("a", "first_stage", (0, 0)), ("b", "last_stage", (1, last))]]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in TYPES])
@torch.inference_mode()
def test_a_type_of_model_gives_transformers_tokens(name: str, tmp_path: Path) -> None:
    """Give 24 tokens and their logits as `generate` does, after a prompt in chunks of seven tokens where prompts can be cut."""
    prompt = [(n * n * 7 + n * 37 + 11) % 290 + 5 for n in range(12)]
    with torch.inference_mode(False):
        expected, logits = by_transformers(model_of(name, tmp_path), prompt)
    compare(open_checkpoint(tmp_path), prompt, expected, logits, CPU)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ON_A_DEVICE)) for n in TYPES if n != "falcon"]
)
@torch.inference_mode()
def test_a_type_of_model_on_a_second_device(name: str, tmp_path: Path) -> None:
    """Give the same where the actors compute on a device, which mixes with no other.

    falcon is left out: it makes its positions in a way that the stand-in for a device cannot follow."""
    prompt = [(n * n * 7 + n * 37 + 11) % 290 + 5 for n in range(12)]
    with torch.inference_mode(False):
        expected, logits = by_transformers(model_of(name, tmp_path), prompt)
    with pretended():
        compare(open_checkpoint(tmp_path), prompt, expected, logits, str(GPU))


def compare(checkpoint: Checkpoint, prompt: list[int], expected: list[int], logits: torch.Tensor, device: str) -> None:
    """Generate by each plan on a device, and compare tokens and logits."""
    for plan in plans(checkpoint):
        chunk = len(prompt) if checkpoint.config.uncut else 7
        made, given = Actors(checkpoint, plan, device).generate(prompt, chunk)
        assert made == expected, plan
        told = logits.isfinite()  # the library rules some tokens out
        assert (given - logits)[told].abs().max() < 1e-4 * max(1.0, float(logits[told].std())), plan


def test_at_least_forty_types_are_tried() -> None:
    """Have a type in the table only if transformers knows it."""
    from transformers import CONFIG_MAPPING

    assert len(TYPES) >= 40
    assert {*CAUSAL, *SEQ2SEQ} <= set(CONFIG_MAPPING)
