"""Choose the codec of each message of a `codec: auto` edge by its size, the link's measured speed, and each codec's cost.

A codec shrinks a message of n bytes to r·n bytes. Encoding takes a time of e·n, decoding about as long, and the transfer takes
r·n / speed. The codec with the smallest sum wins. Lossless codecs may always be chosen, a lossy form only if the edge names
it (`auto:int8`). This module does no I/O and does not import torch; the caller passes all times.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..format.codec import PACKERS, RAW, Codec, Coding, parse

PREFIX = "auto"
LEAST_BYTES = 16 * 1024
"""Messages of fewer bytes are sent raw: encoding them gains nothing."""
MEASURED_BYTES = 64 * 1024
"""Only messages of at least this many bytes measure a link's speed; in smaller ones the latency dominates."""
TRY_EVERY = 64
"""One message in this many uses the next codec in turn instead of the best one, to measure its current cost."""
WEIGHT = 0.25
"""Weight of the newest measurement in the moving averages."""


@dataclass(slots=True)
class _Cost:
    """Hold moving averages of one codec: the nanoseconds to write a byte, and the share of bytes that remains."""

    ns_a_byte: float
    ratio: float


def candidates(text: str) -> tuple[Codec, ...] | None:
    """Return the codecs that `auto` or `auto:FORM` may choose, or None if `text` is another codec.

    Raises:
        ValueError: FORM does not exist, is raw, or includes a packer.
    """
    word, colon, form = text.partition(":")
    if word != PREFIX:
        return None
    forms = [Codec()]
    if colon:
        named = parse(form)
        if named.packer or named.form == RAW:
            raise ValueError(
                f"codec {text!r}: expected auto, or auto: followed by a lossy form without a packer, such as auto:int8"
            )
        forms.append(named)
    return tuple(form._replace(packer=packer) for form in forms for packer in range(len(PACKERS)))


class Chooser:
    """Choose codecs for one sending link.

    Attributes:
        ns_a_byte: the nanoseconds that the link takes for a byte; None until they have been measured.
    """

    def __init__(self, codecs: tuple[Codec, ...]) -> None:
        self._codecs = codecs
        self._costs: dict[Codec, _Cost] = {codecs[0]: _Cost(0.0, 1.0)}
        self.ns_a_byte: float | None = None
        self._chosen = 0
        self._turn = 0

    def measured(self, nbytes: int, took_ns: int) -> None:
        """Record how many nanoseconds a message took to reach a receiver that was waiting for it."""
        self.ns_a_byte = _average(self.ns_a_byte, took_ns / max(1, nbytes))

    def choose(self, nbytes: int) -> Codec:
        """Return the codec for a message of `nbytes` bytes."""
        if nbytes < LEAST_BYTES or self.ns_a_byte is None:
            return self._codecs[0]  # raw messages also measure the link's speed
        untried = next((codec for codec in self._codecs if codec not in self._costs), None)
        if untried is not None:
            return untried
        self._chosen += 1
        if self._chosen % TRY_EVERY == 0:
            self._turn = (self._turn + 1) % len(self._codecs)
            return self._codecs[self._turn]
        return min(self._codecs, key=self._ns)

    def learned(self, codec: Codec, coding: Coding, nbytes: int) -> None:
        """Record the cost of encoding one message (`coding`), and its number of bytes after encoding."""
        if coding.raw_bytes >= LEAST_BYTES:
            seen = self._costs.get(codec)
            ns_a_byte, ratio = coding.took_ns / coding.raw_bytes, nbytes / coding.raw_bytes
            self._costs[codec] = _Cost(
                _average(seen.ns_a_byte if seen else None, ns_a_byte), _average(seen.ratio if seen else None, ratio)
            )

    def _ns(self, codec: Codec) -> float:
        """Estimate the nanoseconds per byte with this codec: writing, carrying and reading."""
        assert self.ns_a_byte is not None
        cost = self._costs[codec]
        return 2 * cost.ns_a_byte + cost.ratio * self.ns_a_byte


def _average(before: float | None, now: float) -> float:
    return now if before is None else before + WEIGHT * (now - before)
