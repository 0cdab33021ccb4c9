"""`codec: auto`: which codec a message goes in, by its size, the link's measured speed, and what each codec was seen to cost.

A message of n bytes that a codec shrinks to r·n takes e·n to write, about as long to read, and r·n / speed on the way; the
least sum wins. What is lossless may always be chosen; a form that loses something only where the edge names it (`auto:int8`).
No I/O and no torch here; clocks are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..format.codec import PACKERS, RAW, Codec, Coding, parse

PREFIX = "auto"
LEAST_BYTES = 16 * 1024
"""Smaller messages go as they are: there is nothing to win."""
MEASURED_BYTES = 64 * 1024
"""Only a message of so many bytes says how fast a link is; of a smaller one the latency is the most part."""
TRY_EVERY = 64
"""One message in so many goes in a codec that is not the best, to see what that costs by now."""
WEIGHT = 0.25
"""Of the newest measurement in a moving average."""


@dataclass(slots=True)
class _Cost:
    """Of one codec: nanoseconds to write a byte, and the share of bytes that is left. Averages."""

    ns_a_byte: float
    ratio: float


def candidates(text: str) -> tuple[Codec, ...] | None:
    """What `auto` or `auto:FORM` may choose among; None if `text` is another codec.

    Raises:
        ValueError: FORM is no form, or names a packer.
    """
    word, colon, form = text.partition(":")
    if word != PREFIX:
        return None
    forms = [Codec()]
    if colon:
        named = parse(form)
        if named.packer or named.form == RAW:
            raise ValueError(
                f"codec {text!r}: expected auto, or auto: and a form that may be chosen, such as auto:int8"
            )
        forms.append(named)
    return tuple(form._replace(packer=packer) for form in forms for packer in range(len(PACKERS)))


class Chooser:
    """The choice of one sending link."""

    def __init__(self, codecs: tuple[Codec, ...]) -> None:
        self._codecs = codecs
        self._costs: dict[Codec, _Cost] = {codecs[0]: _Cost(0.0, 1.0)}
        self._ns_a_byte: float | None = None
        self._chosen = 0
        self._turn = 0

    @property
    def bytes_per_second(self) -> float | None:
        """The link's speed, once it is known."""
        return 1e9 / self._ns_a_byte if self._ns_a_byte else None

    def measured(self, nbytes: int, took_ns: int) -> None:
        """A message took so long on its way to a receiver that waited for it."""
        self._ns_a_byte = _average(self._ns_a_byte, took_ns / max(1, nbytes))

    def choose(self, nbytes: int) -> Codec:
        """The codec for a message of so many bytes."""
        if nbytes < LEAST_BYTES or self._ns_a_byte is None:
            return self._codecs[0]  # which also finds out how fast the link is
        untried = next((codec for codec in self._codecs if codec not in self._costs), None)
        if untried is not None:
            return untried
        self._chosen += 1
        if self._chosen % TRY_EVERY == 0:
            self._turn = (self._turn + 1) % len(self._codecs)
            return self._codecs[self._turn]
        return min(self._codecs, key=self._ns)

    def learned(self, codec: Codec, coding: Coding, nbytes: int) -> None:
        """What a codec made of a message: `coding`, and the bytes that are left."""
        if coding.raw_bytes >= LEAST_BYTES:
            seen = self._costs.get(codec)
            ns_a_byte, ratio = coding.took_ns / coding.raw_bytes, nbytes / coding.raw_bytes
            self._costs[codec] = _Cost(
                _average(seen.ns_a_byte if seen else None, ns_a_byte), _average(seen.ratio if seen else None, ratio)
            )

    def _ns(self, codec: Codec) -> float:
        """What a byte costs in this codec: written, carried, read."""
        assert self._ns_a_byte is not None
        cost = self._costs[codec]
        return 2 * cost.ns_a_byte + cost.ratio * self._ns_a_byte


def _average(before: float | None, now: float) -> float:
    return now if before is None else before + WEIGHT * (now - before)
