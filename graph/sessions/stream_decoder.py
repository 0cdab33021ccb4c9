"""Decode the tokens of a stream one by one, so that the pieces make exactly the text of all tokens decoded at once."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from typing import Any, Protocol

from .text_codec import TextCodec, cleaned


class StreamDecoder(Protocol):
    """Decode a growing list of ids. Bytes that do not yet make a whole character are held back."""

    def add(self, token: int) -> str:
        """Return the text that `token` completes, or "" if it leaves a character unfinished."""

    def rest(self) -> str:
        """Return what is still held back at the end of the stream."""


def of(codec: TextCodec) -> StreamDecoder:
    """Return a decoder for one stream, the fastest that is exact for the codec's kind of tokenizer."""
    kind = json.loads(codec.tokenizer.decoder.__getstate__()) if codec.tokenizer.decoder is not None else {}
    if kind.get("type") == "ByteLevel":
        return ByteDecoder(codec)
    made = WindowDecoder(codec, _falls_back(kind))
    return CleaningDecoder(made) if codec.cleans else made


def _falls_back(decoder: dict[str, Any]) -> bool:
    """Return whether the decoder turns tokens such as `<0xE2>` into bytes."""
    return decoder.get("type") == "ByteFallback" or any(_falls_back(each) for each in decoder.get("decoders", ()))


class ByteDecoder:
    """Decode tokens that stand for bytes: those bytes, decoded as UTF-8."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._special = set(codec.controls().values())
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._bytes(token))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        token = self._codec.twins.get(token, token)
        if token in self._special:
            return b""
        text = self._codec.tokenizer.id_to_token(token)
        if text is None:  # beyond the vocabulary: models are padded to round sizes
            return b""
        try:
            return bytes([BYTES[character] for character in text])
        except KeyError:  # an added token that is spelled as text
            return bytes(text, "utf-8")


def _bytes_of_characters() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: itself if printable, else one of the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES = _bytes_of_characters()


class WindowDecoder:
    """Decode with the library, from the piece before the last one that was shown.

    So a decoder that treats the beginning of a text in its own way, as by leaving out a space, sees no new beginning.
    """

    def __init__(self, codec: TextCodec, falls_back: bool) -> None:
        self._codec = codec
        self._decode: Callable[[list[int]], str] = codec.decode_as_it_is
        self._falls_back = falls_back
        self._special = set(codec.controls().values())
        self._ids: list[int] = []
        self._start = self._shown = 0

    def add(self, token: int) -> str:
        self._ids.append(token)
        if self._falls_back and self._goes_on(token):
            return ""  # a run of bytes is decoded as a whole, since one wrong byte spoils it
        return self._piece(last=False)

    def rest(self) -> str:
        return self._piece(last=True)

    def _piece(self, *, last: bool) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if not last and (len(now) <= len(before) or now.endswith("\N{REPLACEMENT CHARACTER}")):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _goes_on(self, token: int) -> bool:
        """Return whether a token is a byte, or is not shown, so that it does not end a run of bytes."""
        token = self._codec.twins.get(token, token)
        text = self._codec.tokenizer.id_to_token(token)
        if text is None or token in self._special:
            return True
        return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


class CleaningDecoder:
    """Remove spaces before punctuation from what another decoder makes (`text_codec.cleaned`).

    A word is held back until the next one begins: only then it is known whether its spaces stay.
    """

    def __init__(self, inner: StreamDecoder) -> None:
        self._inner = inner
        self._held = ""

    def add(self, token: int) -> str:
        self._held += self._inner.add(token)
        at = self._held.rfind(" ")
        while at > 0 and (self._held[at - 1] == " " or self._held[:at].endswith(" '")):
            at = self._held.rfind(" ", 0, at)  # what is removed must not begin before the cut and end after it
        if at <= 0:
            return ""
        shown, self._held = self._held[:at], self._held[at:]
        return cleaned(shown)

    def rest(self) -> str:
        shown, self._held = self._held + self._inner.rest(), ""
        return cleaned(shown)
