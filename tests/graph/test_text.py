"""Tokenizer, chat template and the text of a stream."""

from __future__ import annotations

import json
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ranvier.actors.checkpoint import open_checkpoint
from ranvier.actors.errors import CheckpointError
from ranvier.graph import template, tokenizer
from ranvier.graph.text_stream import TextStream

TEXTS = [
    "Hello world 12345  foo\n\n bar's naïve 日本 don't", "", " ", "\n", "a" * 300, "🙂🙃 emoji", "tabs\tand\r\nreturns",
    "<|im_start|>user\nhi<|im_end|>", "def f(x):\n    return x ** 2\n", "3.14159 2024-01-02", "ÀÉÎÕÜ ß ø ł",
]  # fmt: skip


@pytest.fixture(scope="module")
def codec(smollm2: Path) -> tokenizer.TextCodec:
    return tokenizer.of(open_checkpoint(smollm2))


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


def test_token_ids_are_those_of_transformers(codec: tokenizer.TextCodec, reference: Any) -> None:
    """The tokenizer in the GGUF file, on words, digits, white space, special tokens, other scripts; and back."""
    for text in TEXTS:
        ids = codec.encode(text, special=True)
        assert ids == reference(text)["input_ids"], text
        assert codec.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_the_chat_is_that_of_transformers(codec: tokenizer.TextCodec, reference: Any) -> None:
    assert codec.chat_template is not None
    for messages in (
        [{"role": "user", "content": "Hi {{ 7 * 7 }}"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ):
        text = template.render(codec.chat_template, messages, codec.bos_token, codec.eos_token)
        assert text == reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% set x = namespace(s='xxxxxxxx') %}{% for i in range(99999) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ messages[0].nothing.nothing }}",
        "x" * (1 << 19),
    ],
)
def test_a_template_that_escapes_case_43(hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 43: the sandbox ends it; nothing outside is reached, no memory or time is used up."""
    monkeypatch.chdir(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(CheckpointError, match="chat template: "):
        template.render(hostile, [{"role": "user", "content": "hi"}], "", "")
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_AS) == limit


def test_the_time_limit_holds_in_any_thread() -> None:
    """A run for scripts has its event loop in a thread of its own."""
    caught: list[str] = []

    def main() -> None:
        try:
            template.render(
                "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
                [],
                "",
                "",
            )
        except CheckpointError as error:
            caught.append(str(error))

    thread = threading.Thread(target=main)
    thread.start()
    thread.join(20)
    assert caught == ["chat template: took over 1 s"]


def test_letters_over_several_tokens_come_out_whole(codec: tokenizer.TextCodec) -> None:
    """Piece by piece or at once: the same text, and no piece holds half a letter."""
    for text in TEXTS:
        ids = codec.encode(text, special=False)
        stream = TextStream(codec, ())
        pieces = [stream.add(token) for token in ids]
        pieces.append(stream.rest())
        assert "".join(pieces) == codec.decode(ids)
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "stopped"),
    [
        ("one two three four", (" three",), "one two", True),
        ("one two three four", ("zebra",), "one two three four", False),
        ("one two three four", ("fourteen",), "one two three four", False),
        ("one two three four", ("two th", "one two"), "", True),
        ("aaaab", ("aab",), "aa", True),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], shown: str, stopped: bool, codec: tokenizer.TextCodec) -> None:
    """The text ends before the stop string, also when it lies across tokens; nothing of it is ever shown."""
    stream = TextStream(codec, stop)
    out = ""
    for token in codec.encode(text, special=False):
        out += stream.add(token)
        if stream.stopped:
            break
    out += stream.rest()
    assert (out, stream.stopped) == (shown, stopped)
    assert stream.text == shown


def test_a_tokenizer_of_a_folder(tiny: Any, tmp_path: Path) -> None:
    """`tokenizer.json` as it is, the template and special tokens from `tokenizer_config.json`."""
    folder, _ = tiny("plain")
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.Fuse()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    assert not tokenizer.brought_by(open_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match="brings no tokenizer"):
        tokenizer.of(open_checkpoint(tmp_path))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "T", "bos_token": {"content": "<s>"}}))
    codec = tokenizer.of(open_checkpoint(tmp_path))
    assert codec.encode("ab a", special=True) == [2, 0]
    assert (codec.chat_template, codec.bos_token, codec.eos_token) == ("T", "<s>", "")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        tokenizer.of(open_checkpoint(tmp_path))


def test_a_sentencepiece_like_tokenizer_in_gguf() -> None:
    """Scores become merges, unknown letters become bytes, the leading space goes and comes back."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi"]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": letters,
        "tokenizer.ggml.scores": [0.0] * 259 + [-5.0, -6.0, -7.0, -2.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    codec = tokenizer._from_gguf(fields, "test")
    assert codec.encode("hi hi", special=True) == [1, 263, 263]
    assert codec.encode("hié", special=False) == [263, 3 + 0xC3, 3 + 0xA9]
    assert codec.decode(codec.encode("hi é", special=True)) == "hi é"
