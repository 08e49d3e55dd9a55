"""Sizes as people write them. Binary units only: "10GB" means two things, and a volume must not."""

from __future__ import annotations

import re
from fractions import Fraction

UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}
MAX_SIZE = (1 << 63) - 1
"""The largest size a file can have (off_t)."""

_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,19})?) ?([A-Za-z]*)", re.ASCII)


class InvalidSize(ValueError):
    """A text that is no size, or not one we accept."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(f"{text!r} is no size: {reason}")
        self.text = text
        self.reason = reason


def parse_size(text: str) -> int:
    """The bytes that `text` names: a number, fractional if need be, and one of B, KiB, MiB, GiB, TiB, PiB.

    Raises InvalidSize, also for what is not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidSize(text, "write a number and a unit, like 10GiB")
    number, unit = match.groups()
    if unit not in UNITS:
        raise InvalidSize(text, f"the unit is one of {', '.join(name for name in UNITS if name)}")
    size = Fraction(number) * UNITS[unit]
    if size.denominator != 1:
        raise InvalidSize(text, "it is not a whole number of bytes")
    if size > MAX_SIZE:
        raise InvalidSize(text, f"the largest is {MAX_SIZE} bytes")
    return size.numerator


def format_size(size: int) -> str:
    """`size` in the largest unit it fills, with up to two decimals, cut and not rounded: never more than there is."""
    if size < 0:
        raise ValueError(f"{size} is no size")
    unit = max((name for name in UNITS if name and UNITS[name] <= max(size, 1)), key=UNITS.__getitem__)
    hundredths = size * 100 // UNITS[unit]
    number = f"{hundredths // 100}.{hundredths % 100:02}".rstrip("0").rstrip(".")
    return number + unit
