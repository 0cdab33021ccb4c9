"""Build tokenizers from the metadata of GGUF files, and compare them with the tokenizers that the metadata was made from."""

from __future__ import annotations

import functools
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ranvier.actors.checkpoint.gguf_tokens import ends_of_text
from ranvier.actors.errors import CheckpointError
from ranvier.graph.sessions.pre_tokenizers import SPLITS
from ranvier.graph.sessions.tokenizer_gguf import from_gguf

PAGE: list[str] = json.loads((Path(__file__).parent / "page.json").read_text())
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@functools.cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Return tokens and merges that were learned across words, so that every way of splitting gives other tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([split(r".{1,12}|\n"), BYTES])
    made.train_from_iterator(
        ["\n".join(pydoc_data.topics.topics.values())[:100_000], *PAGE * 30],
        trainers.BpeTrainer(
            vocab_size=2500,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(made.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def metadata(pre: str | None = "gpt-2", **more: Any) -> dict[str, Any]:
    tokens, merges = vocabulary()
    types = [2, 3, 3, 3, 3] + [1] * (len(tokens) - 5)
    named = {"pre": pre} if pre is not None else {}
    fields = {
        "model": "gpt2",
        "tokens": tokens,
        "merges": merges,
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in {**fields, **named, **more}.items()}


def original(*pre: pre_tokenizers.PreTokenizer, whole_words: bool = False) -> Tokenizer:
    """Return the tokenizer as its makers publish it, in the library's own form."""
    tokens, merges = vocabulary()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=whole_words))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(pre))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    return made


def originals() -> dict[str, Tokenizer]:
    """Return the originals by llama.cpp's names: those of transformers' table, and others from published files."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    digits = pre_tokenizers.Digits(individual_digits=True)
    made = {
        name: original(split(pattern), BYTES, whole_words=SPLITS[name].whole_words)
        for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items()
    }
    for name in ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "modern-bert"):
        made[name] = original(GPT2)
    for name in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"):
        made[name] = original(digits, GPT2)
    three = [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+")]
    deepseek = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made["deepseek-v3"] = made["hunyuan-dense"] = original(*three, split(deepseek), BYTES)
    coder = [split(pattern) for pattern in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")]
    made["deepseek-coder"] = original(*coder, digits, BYTES)
    made["stablelm2"] = made["hunyuan"] = original(split(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), BYTES)
    punctuation = split(r"[\p{P}\$\+<=>\^~\|]+")
    made["default"] = original(punctuation, split(GPT2_WORDS), split(r"\p{N}+"), split("[0-9][0-9][0-9]"), BYTES)
    made["chatglm-bpe"] = original(split(GGUF_PRE_TOKENIZER_SPLITS["llama3"]), BYTES)
    made["glm4"] = original(split(GGUF_PRE_TOKENIZER_SPLITS["llama3"]), BYTES, whole_words=True)
    bloom = split(" ?[^(\\s|.,!?…。，、।۔،)]+")
    made["bloom"] = made["poro-chat"] = original(bloom, BYTES)
    made["viking"] = original(bloom, digits, BYTES)
    return made


def test_tokens_are_those_of_the_original() -> None:
    """Encode a page of ten scripts, code and emoji as the original tokenizer does, for every way of splitting words."""
    compared = originals()
    assert len(compared) >= 45
    for name, there in compared.items():
        codec = from_gguf(metadata(name, add_bos_token=False), "test")
        for text in PAGE:
            expected = there.encode(text, add_special_tokens=False).ids
            if not SPLITS[name].nfc or "\u0301" not in text:
                assert codec.encode(text, special=True) == expected, (name, text)
            assert codec.decode(expected) == there.decode(expected)


def test_ways_of_splitting_differ() -> None:
    """Give other tokens for another way of splitting: a table that maps all names to one way would be noticed."""
    made = {
        name: tuple(tuple(from_gguf(metadata(name), "test").encode(text, special=False)) for text in PAGE)
        for name, split in SPLITS.items()
        if split.byte_level
    }
    assert len(set(made.values())) >= 20


def test_qwen_composes_characters() -> None:
    """Compose characters before Qwen's tokenizer, as its `tokenizer.json` does and llama.cpp does not."""
    codec = from_gguf(metadata("qwen2"), "test")
    assert codec.encode("e\u0301", special=False) == codec.encode("\u00e9", special=False)


def test_names_that_llama_cpp_knows() -> None:
    """Know the names of llama.cpp, and list them where a file has another one."""
    assert len(SPLITS) >= 88
    with pytest.raises(CheckpointError, match=r"pre-tokenizer 'new-one' is not built in; built in: .*tekken"):
        from_gguf(metadata("new-one"), "test")


@pytest.mark.parametrize(("pre", "said", "expected"), [
    ("llama-bpe", None, [1]), ("llama-bpe", False, []), ("gpt-2", None, []), ("gpt-2", True, [1]), ("tekken", None, [1]), ("qwen2", None, []),
])  # fmt: skip
def test_the_token_that_begins_a_prompt(pre: str, said: bool | None, expected: list[int]) -> None:
    """Begin a raw prompt as the file says or, if it says nothing, as llama.cpp does for that name."""
    more = {} if said is None else {"add_bos_token": said}
    codec = from_gguf(metadata(pre, **more), "test")
    assert codec.encode("the", special=True) == [*expected, *codec.encode("the", special=False)]
    ended = from_gguf(metadata(pre, add_bos_token=False, add_eos_token=True), "test")
    assert ended.encode("the", special=True) == [*codec.encode("the", special=False), 2]


def test_a_word_of_the_vocabulary_is_one_token() -> None:
    """Take a whole word of the vocabulary as one token where the name asks for it, merges or not."""
    tokens, _ = vocabulary()
    more = {"tokens": [*tokens, "Ġqzx"], "token_type": [1] * (len(tokens) + 1)}
    assert from_gguf(metadata("llama-bpe", **more), "test").encode("the qzx", special=False)[-1] == len(tokens)
    assert from_gguf(metadata("gpt-2", **more), "test").encode("the qzx", special=False)[-1] != len(tokens)


def test_twin_tokens_are_both_decoded() -> None:
    """Decode both of two tokens that have the same text, and encode to the later one, as llama.cpp does."""
    tokens, _ = vocabulary()
    the = tokens.index("the")
    codec = from_gguf(metadata(tokens=[*tokens, "the"], token_type=[1] * (len(tokens) + 1)), "test")
    assert codec.decode([the, len(tokens), the]) == "thethethe"
    assert codec.encode("the", special=False) == [len(tokens)]


def test_unknown_tokens_are_not_shown() -> None:
    """Leave out the unknown token of a text, like all special tokens."""
    codec = from_gguf(metadata(unknown_token_id=0), "test")
    assert codec.decode([0, *codec.encode("the", special=False), 0]) == "the"


@pytest.mark.parametrize("key", ["bos", "eos", "unknown", "eot", "padding"])
def test_an_id_out_of_range_is_named(key: str) -> None:
    """Refuse an id that is not in the vocabulary, and name its field."""
    most = len(vocabulary()[0]) - 1
    with pytest.raises(
        CheckpointError, match=rf"test: tokenizer.ggml.{key}_token_id: expected an id from 0 to {most}, got 99999"
    ):
        from_gguf(metadata(**{f"{key}_token_id": 99999}), "test")


@pytest.mark.parametrize(("fields", "words"), [
    ({"merges": None}, "tokenizer.ggml.merges is missing"),
    ({"merges": ["t h", "th zz"]}, "tokenizer.ggml.merges: .*out of vocabulary"),
    ({"merges": ["ab"]}, "tokenizer.ggml.merges: expected two parts and a space, got 'ab'"),
    ({"token_type": [1]}, "tokenizer.ggml.token_type: expected a type for each of"),
    ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"model": "plamo2"}, "tokenizer 'plamo2' is not built in; built in: gpt2, gemma4, llama, t5"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(fields: dict[str, Any], words: str) -> None:
    """Name the field that is missing or damaged."""
    with pytest.raises(CheckpointError, match=words):
        from_gguf(metadata(**fields), "test")


@pytest.mark.parametrize(("names", "expected"), [
    (["a", "<|im_end|>", "<|endoftext|>"], [0, 1, 2]), (["a", "</s>", "<|plamo:eos|>"], [0]), (["<|end|>", "x"], [0]),
    (["x", "<|return|>", "<|call|>", "<|end|>"], [0, 1, 2]), (["x", "<|calls|>", "<|flush|>", "<|end|>"], [0, 2, 1]),
    (["x", "<end_of_turn>", "[EOS]", "<|file_sep|>"], [0, 1, 2, 3]),
])  # fmt: skip
def test_ends_of_a_text_are_found_by_name(names: list[str], expected: list[int]) -> None:
    """Find the tokens that end a turn by their names, after the one that the file names."""
    assert list(ends_of_text({"tokenizer.ggml.tokens": names, "tokenizer.ggml.eos_token_id": 0}, "test")) == expected


def test_an_end_of_turn_that_the_file_calls_ordinary_is_not_shown() -> None:
    """Treat an end of a turn as a special token, whatever type the file gives it."""
    tokens, _ = vocabulary()
    codec = from_gguf(metadata(token_type=[1] * len(tokens)), "test")
    end = tokens.index("<|im_end|>")
    assert codec.encode("a<|im_end|>", special=False)[-1] == end
    assert codec.decode([end]) == ""


def test_words_with_spaces_spelled_out() -> None:
    """Encode as Gemma 4: merges over characters, with U+2581 for a space and bytes for what is not in the vocabulary."""
    letters = ["<unk>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi", "\n"]
    fields = {
        "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": letters, "tokenizer.ggml.merges": ["h i", "▁ hi"],
        "tokenizer.ggml.token_type": [2, 3] + [6] * 256 + [1] * 6, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    codec = from_gguf(fields, "test")
    assert codec.encode("hi hi\nhié", special=True) == [1, 261, 262, 263, 261, 2 + 0xC3, 2 + 0xA9]
    assert codec.decode(codec.encode("hi  hié", special=True)) == "hi  hié"


def test_the_likeliest_pieces_are_those_of_sentencepiece(tmp_path: Path) -> None:
    """Encode and decode T5's kind of vocabulary as SentencePiece does, with its own normalisation of characters."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "atom-literals", "booleans")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spm"), vocab_size=300, model_type="unigram", pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    oracle = sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model"))
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tmp_path / "spm.model").read_bytes())
    fields = {
        "tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.precompiled_charsmap": list(proto.normalizer_spec.precompiled_charsmap),
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip
    codec = from_gguf(fields, "test")
    for text in (
        "the assignment  of a name ",
        "ﬁve e\u0301tudes",
        "x = [1, 2]",
        "",
        "日本語 and more",
        " begins with a space",
    ):
        ids = oracle.encode(text)
        assert codec.encode(text, special=False) == ids
        assert codec.encode(text, special=True) == [*ids, 1]
        assert 2 in ids or codec.decode(ids) == oracle.decode(ids)
