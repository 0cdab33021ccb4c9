"""Cut the text of a stream at stop strings. Text that may still become a stop string is held back until it cannot."""

from __future__ import annotations

from collections.abc import Sequence

from . import stream_decoder
from .text_codec import TextCodec


class TextStream:
    """Turn tokens into text that is safe to show. `stopped` becomes true when a stop string has been reached.

    Special tokens are not part of the text. A stop string that holds one (`<|im_end|>`) is looked for in the text with
    them. Stop strings are ignored until there are `min_tokens` tokens. Without a codec there is no text.
    """

    def __init__(self, codec: TextCodec | None, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._decoder = stream_decoder.of(codec) if codec is not None else None
        self._special = (
            {number: text for text, number in codec.controls().items()} if codec is not None and stop else {}
        )
        self._plain = _Watch([text for text in stop if text])
        names = set(self._special.values())
        self._marked = _Watch([text for text in stop if text and any(name in text for name in names)])
        self._ignored = min_tokens - 1
        """Number of tokens to come at which stop strings are ignored."""
        self._made = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """Return the text that was shown so far."""
        return self._made[: self._shown]

    def add(self, token: int) -> str:
        if self._decoder is None:
            return ""
        piece = self._decoder.add(token)
        found = [self._plain.add(piece, len(self._made)), self._marked.add(piece, len(self._made))]
        self._made += piece
        if token in self._special:
            found.append(self._marked.add_special(self._special[token], len(self._made)))
        self._ignored -= 1
        return self._show(found if self._ignored < 0 else [], last=False)

    def rest(self) -> str:
        """Return the text that was held back, at the end of a stream that reached no stop string."""
        if self._decoder is None or self.stopped:
            return ""
        piece = self._decoder.rest()
        found = [self._plain.add(piece, len(self._made)), self._marked.add(piece, len(self._made))]
        self._made += piece
        return self._show(found, last=True)

    def _show(self, found: Sequence[int | None], *, last: bool) -> str:
        ends = [each for each in found if each is not None]
        if ends:
            self.stopped = True
            end = min(ends)
        elif last:
            end = len(self._made)
        else:
            end = min(self._plain.safe(len(self._made)), self._marked.safe(len(self._made)))
        end = max(end, self._shown)
        shown, self._shown = self._made[self._shown : end], end
        return shown


class _Watch:
    """Look for stop strings in a text that grows. Positions are numbers of characters of the shown text."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._most = max(map(len, stop), default=0)
        self._tail = ""
        self._at: list[int] = []
        """Position of each character of the tail. The characters of a special token have the same one."""

    def add(self, piece: str, position: int) -> int | None:
        """Return the position at which a stop string begins that `piece` completes; None if it completes none."""
        return self._grow(piece, range(position, position + len(piece)))

    def add_special(self, name: str, position: int) -> int | None:
        """Do the same as `add` for a special token's name, which is not shown."""
        return self._grow(name, [position] * len(name))

    def _grow(self, piece: str, positions: Sequence[int]) -> int | None:
        if not self._stop or not piece:
            return None
        self._tail += piece
        self._at += positions
        found = [at for text in self._stop if (at := self._tail.find(text)) >= 0]
        if found:
            begin = self._at[min(found)]
            self._tail, self._at = "", []  # if it is ignored, the search goes on after it
            return begin
        keep = max(len(self._tail) - self._most + 1, 0)
        self._tail, self._at = self._tail[keep:], self._at[keep:]
        return None

    def safe(self, end: int) -> int:
        """Return up to which position nothing can become a part of a stop string; `end` if all is safe."""
        for begin in range(len(self._tail)):
            if any(text.startswith(self._tail[begin:]) for text in self._stop):
                return self._at[begin]
        return end
