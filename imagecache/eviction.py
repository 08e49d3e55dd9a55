"""Which images go when there is too little room."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """An image: `allocated` is what it takes of the disk in bytes, `used_at` when it was last handed out (or made).
    `pinned`: something lives on it."""

    digest: str
    allocated: int
    used_at: dt.datetime
    pinned: bool = False


def choose(candidates: Iterable[Candidate], allocated_total: int, low: int, high: int) -> list[str]:
    """The digests to evict, in this order: none while `allocated_total` is not above `high`; else the least recently
    used first, until not more than `low` would be left. Pinned ones never go, so it may not be enough. All in bytes of
    the disk. Raises ValueError when `low` is above `high`."""
    if low > high:
        raise ValueError(f"the low mark, {low}, is above the high one, {high}")
    chosen: list[str] = []
    left = allocated_total
    if left <= high:
        return chosen
    for candidate in sorted(candidates, key=lambda each: (each.used_at, each.digest)):
        if left <= low:
            break
        if not candidate.pinned and candidate.allocated:
            chosen.append(candidate.digest)
            left -= candidate.allocated
    return chosen
