"""Files laid out on purpose: filled in one go, overwritten block by block, and counted."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from bench.guest import BLOCK
from blockdev.extents import fiemap

GIB = 1 << 30
CHUNK = 8 << 20
#: Writes between two syncs: a guest's writes reach the file system in small lots and not sorted all at once.
LOT = 256


def fill(path: Path, size: int) -> None:
    """Write every byte of a file, in order, past the page cache's readahead and durable at the end."""
    chunk = os.urandom(CHUNK)
    with path.open("r+b", buffering=0) as file:
        for offset in range(0, size, CHUNK):
            os.pwrite(file.fileno(), chunk, offset)
        os.fsync(file.fileno())


def overwrite(path: Path, blocks: Sequence[int]) -> None:
    """Write these blocks of 4 KiB, in this order."""
    content = os.urandom(BLOCK)
    with path.open("r+b", buffering=0) as file:
        for number, block in enumerate(blocks, start=1):
            os.pwrite(file.fileno(), content, block * BLOCK)
            if number % LOT == 0:
                os.fdatasync(file.fileno())
        os.fsync(file.fileno())


def lonely_blocks(size: int, count: int) -> list[int]:
    """`count` random blocks, always the same, no two of them neighbours: each splits off an extent of its own."""
    return random.Random(count).sample(range(1, size // BLOCK, 2), count)


def random_blocks(size: int, share: float) -> list[int]:
    """A `share` of all blocks, each once, in random order."""
    total = size // BLOCK
    return random.Random(total).sample(range(total), int(total * share))


def extents(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in fiemap(file.fileno()))
