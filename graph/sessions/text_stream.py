"""Cut the text of a stream at stop strings. Text that may still become a stop string is held back until it cannot."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import StreamDecoder, TextCodec


class TextStream:
    """Turn tokens into text that is safe to show. `stopped` becomes true when a stop string has been reached.

    Without a codec there is no text.
    """

    def __init__(self, codec: TextCodec | None, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(codec) if codec is not None else None
        self._stop = [text for text in stop if text]
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        return self._show(self._decoder.add(token), last=False) if self._decoder is not None else ""

    def rest(self) -> str:
        """Return the text that was held back, at the end of a stream that reached no stop string."""
        if self._decoder is None or self.stopped:
            return ""
        return self._show(self._decoder.rest(), last=True)

    def _show(self, piece: str, *, last: bool) -> str:
        held = self._held + piece
        found = [held.find(text) for text in self._stop if text in held]
        if found:
            held, self._held, self.stopped = held[: min(found)], "", True
        else:
            keep = 0 if last else self._possible(held)
            held, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += held
        return held

    def _possible(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
