"""Which images go: the least recently used, by what they take of the disk, and never what something lives on."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagecache.eviction import Candidate, choose

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def candidate(name: str, allocated: int, age: int, pinned: bool = False) -> Candidate:
    return Candidate(name, allocated, NOW - dt.timedelta(hours=age), pinned)


OLD, MIDDLE, NEW = candidate("old", 30, 3), candidate("middle", 20, 2), candidate("new", 10, 1)


@pytest.mark.parametrize(
    ("total", "low", "high", "expected"),
    [
        (60, 30, 60, []),
        (60, 30, 59, ["old"]),
        (60, 29, 59, ["old", "middle"]),
        (60, 0, 0, ["old", "middle", "new"]),
        (200, 0, 100, ["old", "middle", "new"]),
    ],
)
def test_oldest_first_down_to_the_low_mark(total: int, low: int, high: int, expected: list[str]) -> None:
    assert choose([NEW, OLD, MIDDLE], total, low, high) == expected


def test_what_is_pinned_stays_whatever_it_costs() -> None:
    pinned = candidate("pinned", 1000, 9, pinned=True)
    assert choose([pinned, NEW], 1010, 0, 100) == ["new"]


def test_what_takes_nothing_of_the_disk_frees_nothing() -> None:
    assert choose([candidate("empty", 0, 9), NEW], 10, 0, 5) == ["new"]


def test_marks_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match="low mark, 2, is above the high one, 1"):
        choose([], 0, 2, 1)


candidates = st.lists(
    st.builds(candidate, st.uuids().map(str), st.integers(0, 100), st.integers(0, 50), st.booleans()), max_size=12
)


@given(candidates, st.integers(0, 300), st.integers(0, 300))
def test_no_more_than_needed_and_no_less(found: list[Candidate], low: int, more: int) -> None:
    total = sum(each.allocated for each in found)
    chosen = choose(found, total, low, low + more)
    by_name = {each.digest: each for each in found}
    sizes = [by_name[name].allocated for name in chosen]
    assert not any(by_name[name].pinned for name in chosen)
    if total <= low + more:
        assert chosen == []
        return
    assert all(total - sum(sizes[:number]) > low for number in range(len(sizes)))
    kept = [each for each in found if each.digest not in chosen and not each.pinned and each.allocated]
    assert total - sum(sizes) <= low or not kept
    assert all(by_name[name].used_at <= each.used_at for name in chosen for each in kept)
