r"""Split text before byte-level BPE, by the names that GGUF files give to the ways of splitting.

The names and what belongs to each are those of llama.cpp (`llama-vocab.cpp`). Where llama.cpp had to rewrite a pattern
for its own engine, the pattern here is the one of the original `tokenizer.json`, which it quotes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True, slots=True)
class Split:
    """Describe one way of splitting. The patterns are applied one after the other; each match becomes a piece.

    With `whole_words`, a piece that is in the vocabulary is one token, whatever the merges say. `add_bos` tells whether
    prompts begin with the token of that name if the file does not say. `byte_level` is False where the vocabulary is
    spelled in characters, with U+2581 for a space. `nfc` composes characters first.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    byte_level: bool = True
    nfc: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return the library's pre-tokenizer."""
        splits: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(_characters(pattern)), "isolated") for pattern in self.patterns
        ]
        if self.byte_level:
            splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(splits)


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"


def _cased(digits: str, short: str = "", signs: str = r"[\r\n/]*") -> str:
    """Return a pattern that splits words where lower case turns into upper case."""
    return (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{short}|{_BEFORE}{_UPPER}+{_LOWER}*{short}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+{signs}|{_SPACES}"
    )


_TEKKEN = _cased(r"\p{N}")
_GPT4O = _cased(r"\p{N}{1,3}", f"{_SHORT}?")
_HAN = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_SIGN_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_DEEPSEEK3 = rf"{_SIGN_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_CJK_DEEPSEEK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED_LETTERS = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    r"\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    r"\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    r"\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    r"\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    r"\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    r"\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    r"\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    r"\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    r"\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_BLOOM = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
"""Digits in groups of three, counted from the end of the number."""
_KIMI_UPPER, _KIMI_LOWER = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
)
_KIMI = (
    rf"[\p{{Han}}]+|{_BEFORE}{_KIMI_UPPER}*{_KIMI_LOWER}+{_SHORT}?|{_BEFORE}{_KIMI_UPPER}+{_KIMI_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_YOUTU = (
    r"[\uac00-\ud7a3\u3131-\u318e]+"
    r"|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    r"|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_AFMOE = (
    r"[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    r"\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_LINES = r"[^\n]+|[\n]+"


def _characters(pattern: str) -> str:
    r"""Return a pattern with its `\u` escapes replaced: the library's engine does not know them."""
    parts = []
    rest = pattern
    while (at := rest.find("\\")) >= 0:
        size = {"u": 6, "U": 10}.get(rest[at + 1], 0)
        parts += [rest[:at], chr(int(rest[at + 2 : at + size], 16)) if size else rest[at : at + 2]]
        rest = rest[at + (size or 2) :]
    return "".join([*parts, rest])


_NAMED: tuple[tuple[Split, tuple[str, ...]], ...] = (
    (Split((_GPT2,)), (
        "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code",
        "roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert", "mpt", "olmo", "jais", "trillion",
        "granite-docling", "exaone4",
    )),
    (Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")), ("default",)),
    (Split((r"\p{N}", _GPT2)), ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2")),
    (Split((_LLAMA3,), whole_words=True, add_bos=True), (
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    )),
    (Split((_LLAMA3,)), ("dbrx", "smaug-bpe", "chatglm-bpe")),
    (Split((_LLAMA3,), whole_words=True), ("glm4", "glm5")),
    (Split((_QWEN2,), nfc=True), ("qwen2",)),
    (Split((_QWEN2,)), (
        "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2",
    )),
    (Split((_QWEN35,), nfc=True), ("qwen35",)),
    (Split((_TEKKEN,), whole_words=True, add_bos=True), ("tekken",)),
    (Split((_GPT4O,)), ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
    (Split((_GPT4O,), whole_words=True), ("granite-embed-multi-97m",)),
    (Split((r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)", _GPT4O)), ("tiny_aya", "cohere2moe")),
    (Split((
        r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$", _CJK_DEEPSEEK, r"\p{N}+",
    )), ("deepseek-llm",)),
    (Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_DEEPSEEK, r"\p{N}")), ("deepseek-coder",)),
    (Split((r"\p{N}{1,3}", _HAN, _DEEPSEEK3)), ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")),
    (Split((
        r"\p{N}{1,3}", _HAN,
        rf"{_SIGN_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", r"\p{N}",
    )), ("spark2_5",)),
    (Split((_YOUTU, _cased(r"\p{N}", f"{_SHORT}?")), whole_words=True), ("youtu",)),
    (Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")), ("falcon",)),
    (Split((_BLOOM,)), ("poro-chat", "bloom", "gpt3-finnish")),
    (Split((_BLOOM, r"\p{N}")), ("viking",)),
    (Split((
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]", _GPT2,
    ), add_bos=True), ("chameleon",)),
    (Split((_KIMI,)), ("kimi-k2",)),
    (Split((r"\p{N}+", r"(?=(\d{3})+(?!\d))")), ("superbpe",)),
    (Split((
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    )), ("bailingmoe", "bailingmoe2", "llada-moe")),
    (Split((rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)), ("seed-coder",)),
    (Split((rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",)), ("ufakzeka",)),
    (Split((_THREES, _AFMOE, _DEEPSEEK3)), ("afmoe",)),
    (Split((_LINES, _QWEN2)), ("laguna",)),
    (Split((
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    )), ("exaone-moe",)),
    (Split((r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), whole_words=True), ("minicpm5",)),
    (Split((
        _LLAMA3.removesuffix(_SPACES) + r"\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)"
        r"|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
    )), ("jais-2",)),
    (Split((_LINES,), byte_level=False, add_bos=True), ("gemma4", "granite-embed-multi-311m")),
    (Split((_LINES,), byte_level=False), ("sarvam-moe",)),
)  # fmt: skip
SPLITS = {name: split for split, names in _NAMED for name in names}
"""Ways of splitting, by llama.cpp's name (`tokenizer.ggml.pre`)."""
