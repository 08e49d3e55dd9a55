from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev.units import MAX_SIZE, UNITS, InvalidSize, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("512B", 512),
        ("10GiB", 10 << 30),
        ("512 MiB", 512 << 20),
        ("1.5TiB", 3 << 39),
        ("0.5KiB", 512),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write a number"),
        ("GiB", "write a number"),
        ("-1GiB", "write a number"),
        ("1e3", "write a number"),
        ("1_000", "write a number"),
        (" 1GiB", "write a number"),
        ("1GiB\n", "write a number"),
        ("1.", "write a number"),
        ("٣GiB", "write a number"),
        ("NaN", "write a number"),
        ("9" * 5000, "write a number"),
        ("10GB", "the unit is one of B, KiB, MiB, GiB, TiB, PiB"),
        ("10gib", "the unit is one of"),
        ("10G", "the unit is one of"),
        ("1.5", "whole number of bytes"),
        ("0.3KiB", "whole number of bytes"),
        ("8192PiB", "the largest is"),
    ],
)
def test_what_is_no_size(text: str, reason: str) -> None:
    with pytest.raises(InvalidSize, match=reason) as refused:
        parse_size(text)
    assert refused.value.text == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1 << 10, "1KiB"),
        (10 << 30, "10GiB"),
        (3 << 39, "1.5TiB"),
        ((1 << 30) - 1, "1023.99MiB"),
        (1 << 60, "1024PiB"),
    ],
)
def test_formats(size: int, text: str) -> None:
    assert format_size(size) == text


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 is no size"):
        format_size(-1)


@given(st.integers(1, 1023), st.sampled_from(sorted(UNITS.values())))
def test_whole_units_come_back(number: int, unit: int) -> None:
    assert parse_size(format_size(number * unit)) == number * unit


@given(st.integers(0, MAX_SIZE))
def test_never_says_more_than_there_is(size: int) -> None:
    text = format_size(size)
    number = text.rstrip("BKMGTPi")
    assert float(number) * UNITS[text[len(number) :]] <= size
