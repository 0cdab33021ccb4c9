"""Show single tokens as text and as bytes, as the log-probabilities of OpenAI's endpoints do."""

from __future__ import annotations

import json

from ..sessions.stream_decoder import BYTES
from ..sessions.text_codec import TextCodec


class Wording:
    """Know the text of each token of a model, special tokens included."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        decoder = codec.tokenizer.decoder if codec is not None else None
        self._bytes = decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"
        self._special = set(codec.controls().values()) if codec is not None else set()
        self._known: dict[int, bytes] = {}

    def to_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for. A token may hold a part of a character."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._made(token)
        return found

    def text(self, token: int) -> str:
        """Return a token's text. A part of a character is written as `\\\\xe2`, as OpenAI writes it."""
        data = self.to_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\\\x{byte:02x}" for byte in data)

    def special(self, token: int) -> str:
        """Return the text of a special token, which an answer's text leaves out; "" for any other token."""
        return self.text(token) if token in self._special else ""

    def _made(self, token: int) -> bytes:
        if self._codec is None:
            return b""
        text = self._codec.tokenizer.id_to_token(token)
        if text is None:
            return b""
        if token in self._special:
            return str(text).encode()
        if self._bytes:
            try:
                return bytes([BYTES[character] for character in text])
            except KeyError:  # an added token that is spelled as text
                return str(text).encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        # behind another token: a decoder may treat the beginning of a text in its own way
        before = self._codec.decode_as_it_is([token])
        return self._codec.decode_as_it_is([token, token])[len(before) :].encode()
