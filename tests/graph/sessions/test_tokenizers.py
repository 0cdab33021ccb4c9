"""Compare tokenizers of many kinds with transformers, token by token, and streams of text with the text as a whole."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import pydoc_data.topics
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ranvier.actors.errors import CheckpointError
from ranvier.graph.sessions import stream_decoder
from ranvier.graph.sessions.text_codec import TextCodec
from ranvier.graph.sessions.text_process import TextProcess
from ranvier.graph.sessions.tokenizer_classes import AS_IT_IS, NEVER_TRUSTED, OF_TYPE
from ranvier.graph.sessions.tokenizer_folder import from_folder

PAGE: list[str] = json.loads((Path(__file__).parent / "page.json").read_text())
"""A page of ten scripts, code, emoji and control characters."""
CORPUS = ["\n".join(pydoc_data.topics.topics.values())[:60_000], *PAGE * 20]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
Config = dict[str, Any]


def splitting(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer over bytes that splits by a pattern."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def over_bytes(pre: pre_tokenizers.PreTokenizer | None = None, *, whole_words: bool = False, **_: Any) -> Tokenizer:
    """Train byte-level BPE."""
    made = Tokenizer(models.BPE(ignore_merges=whole_words))
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))  # fmt: skip
    return made


def over_characters(*, prefix: str) -> Tokenizer:
    """Train BPE as SentencePiece has it. `prefix`: where a space is put before a text: normalizer, first, always, never."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif prefix == "never":
        made.normalizer = normalizers.Replace(" ", "▁")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix, split=False)
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False,
        limit_alphabet=150,
    )  # fmt: skip
    made.train_from_iterator([word for text in CORPUS for word in text.split(" ")], trainer)
    data = json.loads(made.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(data))


def unigram(*normalizing: normalizers.Normalizer, prefix: str = "always", fallback: bool = False) -> Tokenizer:
    """Train SentencePiece's unigram model."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(list(normalizing))
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix)
    made.decoder = decoders.Metaspace("▁", prefix)
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=700, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    )
    data = json.loads(made.to_str())
    # "a" and "aa" are as likely as "aa" and "a", and how they are rounded decides between them
    data["model"]["vocab"] = [
        each for each in data["model"]["vocab"] if not (len(each[0]) > 1 and len(set(each[0])) == 1)
    ]
    made = Tokenizer.from_str(json.dumps(data))
    if fallback:
        data["model"]["byte_fallback"] = True
        data["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        data["decoder"] = json.loads(
            decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prefix)]).__getstate__()
        )
        made = Tokenizer.from_str(json.dumps(data))
    return made


def pieces_of_words(*, lowercase: bool) -> Tokenizer:
    """Train BERT's WordPiece."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIALS, show_progress=False)
    )
    return made


def words() -> Tokenizer:
    """Train a vocabulary of whole words."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(vocab_size=900, special_tokens=SPECIALS, show_progress=False)
    )
    return made


def ends_of_words() -> Tokenizer:
    """Train BPE that marks the ends of words, as CLIP and the first GPT did."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder("</w>")
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False,
    ))  # fmt: skip
    return made


def with_bos(made: Tokenizer) -> Tokenizer:
    """Let a tokenizer begin every text with `<s>`."""
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def limited(made: Tokenizer) -> Tokenizer:
    """Save limits of a training with the tokenizer."""
    made.enable_truncation(8)
    made.enable_padding(length=16)
    return made


def normalised(made: Tokenizer) -> Tokenizer:
    made.normalizer = normalizers.NFC()
    return made


def flagged(made: Tokenizer) -> Tokenizer:
    """Add tokens with every flag."""
    made.add_tokens(
        [AddedToken("return", single_word=True), AddedToken("jump", lstrip=True), AddedToken("say", rstrip=True)]
    )
    made.add_special_tokens([AddedToken("<|x|>", lstrip=True, rstrip=True), AddedToken("Straße", normalized=True)])
    return made


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
ADDED = {
    str(number): {"content": content, "special": special, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    for number, (content, special) in enumerate([("<|im_start|>", True), ("<think>", False), ("<|im_end|>", True)], 900)
}  # fmt: skip
KINDS: dict[str, tuple[Callable[[], Tokenizer], Config, Config]] = {
    # name: the tokenizer, what tokenizer_config.json says beside the named tokens, further files
    "gpt2": (over_bytes, {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "space before": (lambda: over_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)), FAST, {}),
    "llama 3": (lambda: with_bos(over_bytes(splitting(LLAMA3), whole_words=True)), FAST, {}),
    "qwen 2": (lambda: normalised(over_bytes(splitting(QWEN2))), FAST, {}),
    "digits": (
        lambda: over_bytes(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])), FAST, {},
    ),
    "limits of a training": (lambda: limited(over_bytes()), FAST, {}),
    "flags": (lambda: flagged(over_bytes()), FAST, {}),
    "tokens of the config": (over_bytes, {**FAST, "added_tokens_decoder": ADDED, "eos_token": "<|im_end|>"}, {}),
    "extra tokens": (over_bytes, {**FAST, "extra_special_tokens": ["<|a|>", "<|b|>"], "image_token": "<image>"}, {}),
    "named extra tokens": (over_bytes, {**FAST, "extra_special_tokens": {"sound_token": "<sound>"}}, {}),
    "additional tokens": (over_bytes, {**FAST, "additional_special_tokens": ["<|a|>", "the"]}, {}),
    "tokens of older files": (
        over_bytes, FAST,
        {"special_tokens_map.json": {"cls_token": {"content": "<cls>", "lstrip": True}},
         "added_tokens.json": {"<new>": 900, "<cls>": 901}},
    ),
    "split special tokens": (over_bytes, {**FAST, "split_special_tokens": True}, {}),
    "bos that nobody asks for": (over_bytes, {**FAST, "add_bos_token": True, "add_eos_token": True}, {}),
    "gpt2, space before": (over_bytes, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {}),
    "gpt2, other parts": (
        lambda: normalised(over_bytes(splitting(LLAMA3), whole_words=True)), {"tokenizer_class": "GPT2TokenizerFast"}, {},
    ),
    "gpt2's type": (lambda: over_bytes(splitting(QWEN2)), {"model_max_length": 99}, {"config.json": {"model_type": "gpt2"}}),
    "qwen2's type": (over_bytes, FAST, {"config.json": {"model_type": "qwen2"}}),
    "qwen3's type": (over_bytes, {"model_max_length": 99}, {"config.json": {"model_type": "qwen3"}}),
    "qwen3, another class": (over_bytes, FAST, {"config.json": {"model_type": "qwen3"}}),
    "mistral, llama's class": (
        lambda: over_characters(prefix="normalizer"), {"tokenizer_class": "LlamaTokenizer"}, {"config.json": {"model_type": "mistral"}},
    ),
    "llama's class, normalizer": (
        lambda: with_bos(over_characters(prefix="normalizer")), {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, {},
    ),
    "llama's class, legacy": (lambda: over_characters(prefix="first"), {"tokenizer_class": "LlamaTokenizer", "legacy": True}, {}),
    "llama's class, no prefix": (
        lambda: over_characters(prefix="first"), {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, {},
    ),
    "llama's class, bytes": (lambda: over_bytes(splitting(LLAMA3)), {"tokenizer_class": "LlamaTokenizerFast"}, {}),
    "gemma's class": (lambda: with_bos(over_characters(prefix="first")), {"tokenizer_class": "GemmaTokenizerFast"}, {}),
    "gemma's type": (lambda: over_characters(prefix="never"), {"model_max_length": 9}, {"config.json": {"model_type": "gemma3_text"}}),
    "no config": (over_bytes, {}, {}),
    "llama 2": (lambda: with_bos(over_characters(prefix="normalizer")), FAST, {}),
    "metaspace first": (lambda: with_bos(over_characters(prefix="first")), FAST, {}),
    "metaspace always": (lambda: over_characters(prefix="always"), FAST, {}),
    "llama's class": (lambda: with_bos(over_characters(prefix="first")), {"tokenizer_class": "LlamaTokenizer"}, {}),
    "gemma": (lambda: with_bos(over_characters(prefix="never")), FAST, {}),
    "t5": (lambda: unigram(normalizers.NFKC()), FAST, {}),
    "albert": (lambda: unigram(normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()), FAST, {}),
    "unigram with bytes": (lambda: unigram(normalizers.NFC(), fallback=True), FAST, {}),
    "bert": (lambda: pieces_of_words(lowercase=True), FAST, {}),
    "spaces removed": (lambda: pieces_of_words(lowercase=True), {**FAST, "clean_up_tokenization_spaces": True}, {}),
    "t5, spaces removed": (lambda: unigram(normalizers.NFKC()), {**FAST, "clean_up_tokenization_spaces": True}, {}),
    "bpe, spaces kept": (over_bytes, {**FAST, "clean_up_tokenization_spaces": True}, {}),
    "bert, cased": (lambda: pieces_of_words(lowercase=False), FAST, {}),
    "words": (words, FAST, {}),
    "ends of words": (ends_of_words, FAST, {}),
}  # fmt: skip


@functools.cache
def trained(kind: str) -> str:
    """Return the tokenizer of a kind as JSON. Training takes a second, and two tests need it."""
    return KINDS[kind][0]().to_str()


def folder_of(kind: str, folder: Path) -> Path:
    """Write the files of a kind into a folder."""
    _, config, files = KINDS[kind]
    (folder / "tokenizer.json").write_text(trained(kind))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config:
        named = {} if "model_max_length" in config else NAMED  # else the names that the class gives them
        (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def check_page(codec: TextCodec, reference: Any) -> None:
    for text in (*PAGE, "<s>a<|im_start|>b<think>c</think><|x|> d<new><cls> e<image><|a|></s>"):
        for special in (True, False):
            ids = codec.encode(text, special=special)
            assert ids == reference(text, add_special_tokens=special, truncation=False, padding=False)["input_ids"], (
                text
            )
        assert codec.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Encode a page of ten scripts, code, emoji and control characters as transformers does."""
    codec, reference = from_folder(folder_of(kind, tmp_path)), theirs(tmp_path)
    check_page(codec, reference)
    assert dict(codec.special) == reference.special_tokens_map


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_text_as_a_whole(kind: str, tmp_path: Path) -> None:
    """Decode 10,000 random sequences of tokens one by one, to the text that decoding all at once gives."""
    codec = from_folder(folder_of(kind, tmp_path))
    vocab = codec.tokenizer.get_vocab_size(with_added_tokens=True)
    rng = random.Random(0)
    pieces = [token for text in PAGE for token in codec.encode(text, special=True)]
    for _ in range(10_000):
        ids = [
            rng.choice(pieces) if rng.random() < 0.6 else rng.randrange(vocab + 4) for _ in range(rng.randrange(1, 9))
        ]
        decoder = stream_decoder.of(codec)
        assert "".join([*map(decoder.add, ids), decoder.rest()]) == codec.decode(ids), ids


@pytest.mark.parametrize(("kind", "name", "model_type"), [
    ("t5", "T5TokenizerFast", "t5"), ("gpt2", "BartTokenizerFast", "bart"), ("gpt2", "CohereTokenizerFast", "cohere"),
    ("gpt2", "GPTNeoXTokenizerFast", "gpt_neox"), ("llama 2", "CodeLlamaTokenizer", "llama"), ("bert", "BertTokenizer", "bert"),
    ("t5", "LlamaTokenizer", "llama"), ("llama 2", "LlamaTokenizer", "phi3"), ("gpt2", "NoSuchTokenizer", "llama"),
])  # fmt: skip
def test_other_classes_are_those_of_transformers(kind: str, name: str, model_type: str, tmp_path: Path) -> None:
    """Give the tokens of classes that only transformers knows, or that it does not trust or does not know."""
    folder_of(kind, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**NAMED, "tokenizer_class": name}))
    check_page(from_folder(tmp_path), theirs(tmp_path))


def test_the_types_are_those_of_transformers() -> None:
    """Choose the class of a type of models as transformers' table does."""
    from transformers.models.auto import tokenization_auto as auto

    assert {kind: auto.TOKENIZER_MAPPING_NAMES[kind] for kind in OF_TYPE} == OF_TYPE
    generic = ("TokenizersBackend", "MistralCommonBackend")
    assert all(auto.TOKENIZER_MAPPING_NAMES[kind] in generic for kind in AS_IT_IS)
    distrusted = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert {kind for kind in OF_TYPE if kind in distrusted} == set(NEVER_TRUSTED)


@pytest.mark.parametrize("kind", ["split special tokens", "tokens of the config", "llama 2"])
def test_the_process_for_prompts_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Encode prompts in the process that may be killed as the codec itself does."""
    codec = from_folder(folder_of(kind, tmp_path))
    with contextlib.closing(TextProcess(codec)) as process:
        for text in (*PAGE[:5], "<s>a<|im_start|>b<think>c</think></s>"):
            assert process.ids(text) == codec.encode(text, special=True)
            bare = process.ids(text, special=False)
            assert bare == codec.encode(text, special=False)
            assert kind != "llama 2" or process.ids(text) == [1, *bare]


def test_vocab_and_merges_alone(tmp_path: Path) -> None:
    """Read `vocab.json` and `merges.txt`, as older uploads of gpt2 have them."""
    over_bytes().model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **NAMED}))
    check_page(from_folder(tmp_path), theirs(tmp_path))


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """Read `tokenizer.model` as llama has it, against transformers and the sentencepiece package itself."""
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=700, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    codec = from_folder(tmp_path)
    check_page(codec, theirs(tmp_path))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in PAGE:
        if not text.startswith(" "):  # transformers puts no second space before such a text
            assert codec.encode(text, special=False) == processor.encode(text), text


def test_a_tiktoken_file_alone(tmp_path: Path) -> None:
    """Read `tokenizer.model` in tiktoken's form as Llama 3 has it, against the tiktoken package itself."""
    import tiktoken

    vocab = json.loads(over_bytes(splitting(LLAMA3)).to_str())["model"]["vocab"]
    ranks: dict[bytes, int] = {}
    for token in sorted(set(vocab) - set(SPECIALS), key=lambda t: (len(t) > 1, vocab[t])):
        ranks[bytes(stream_decoder.BYTES[letter] for letter in token)] = len(ranks)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    codec = from_folder(tmp_path)
    encoding = tiktoken.Encoding("test", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
    for text in PAGE:
        assert codec.encode(text, special=False) == encoding.encode(text, disallowed_special=()), text


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say what to install where a tokenizer's files need transformers."""
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"no tokenizer.json; for tokenizer.model, pip install 'ranvier\[hf\]'"):
        from_folder(tmp_path)


def test_a_tokenizer_that_brings_code_is_refused(tmp_path: Path) -> None:
    """Never run code of a checkpoint, and say so."""
    (tmp_path / "qwen.tiktoken").write_bytes(b"YQ== 0\n")
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
    with pytest.raises(CheckpointError, match="brings its own code, which is never run"):
        from_folder(tmp_path)


def test_a_tekken_file_alone(tmp_path: Path) -> None:
    """Read `tekken.json` as Mistral has it, against the tiktoken package with the same ranks."""
    import tiktoken

    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b" t": 258, b" the": 259}
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks.items()
    ]
    special = [
        {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(["<unk>", "<s>", "</s>"])
    ]
    config = {
        "pattern": pattern, "num_vocab_tokens": 260, "default_vocab_size": 263, "default_num_special_tokens": 3, "version": "v3",
    }  # fmt: skip
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    codec = from_folder(tmp_path)
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in PAGE:
        expected = [3 + rank for rank in encoding.encode(text, disallowed_special=())]
        assert codec.encode(text, special=False) == expected, text
        assert codec.decode(expected) == text
