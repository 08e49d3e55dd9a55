"""A clone of a volume that is being written is one moment of it."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from blockdev.extents import EXTENT_SHARED, fiemap
from pools.directory import DirectoryPool
from tests.pools.support import MIB, write

BLOCK = 4096
BLOCKS = 4096
STRIDE = 1597  # prime to BLOCKS: each round visits every block once, neighbours far apart in time

WRITER = f"""
import os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print("writing", flush=True)
sequence = 1
while True:
    os.pwrite(fd, struct.pack("<Q", sequence) * {BLOCK // 8}, sequence * {STRIDE} % {BLOCKS} * {BLOCK})
    sequence += 1
"""


@contextmanager
def writer(path: Path) -> Iterator[None]:
    """A process that writes 1, 2, 3, ... into one block after another, over and over."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
    with process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def last_write(path: Path) -> int:
    """The sequence number up to which `path` holds every write, and none after it."""
    content = path.read_bytes()
    blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
    values = [struct.unpack_from("<Q", block)[0] for block in blocks]
    assert blocks == [struct.pack("<Q", value) * (BLOCK // 8) for value in values], "a torn block"
    last = max(values)
    inverse = pow(STRIDE, -1, BLOCKS)
    for index, value in enumerate(values):
        newest = last - (last - index * inverse) % BLOCKS  # the last write to this block that is not after `last`
        assert value == max(newest, 0), f"block {index} holds write {value}, though write {last} is there"
    return last


def test_clones_and_snapshots_under_a_writer_hold_a_prefix_of_its_writes(reflink_directory: Path) -> None:
    pool, volume_id = DirectoryPool("default", reflink_directory), uuid4()
    pool.activate()
    pool.create(volume_id, BLOCKS * BLOCK)
    clones, snapshots = [uuid4() for _ in range(4)], [uuid4() for _ in range(4)]
    with writer(pool.backing(volume_id).path):
        for clone, snapshot in zip(clones, snapshots, strict=True):
            pool.clone_volume(volume_id, clone, BLOCKS * BLOCK)
            pool.snapshot(volume_id, snapshot)
    seen = []
    for clone, snapshot in zip(clones, snapshots, strict=True):
        seen.append(last_write(pool.backing(clone).path))
        seen.append(last_write(reflink_directory / "snapshots" / f"{snapshot}.raw"))
    seen.append(last_write(pool.backing(volume_id).path))
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]


def test_a_clone_shares_its_extents_until_written(reflink_directory: Path) -> None:
    pool, volume_id, clone = DirectoryPool("default", reflink_directory), uuid4(), uuid4()
    pool.activate()
    pool.create(volume_id, 4 * MIB)
    write(pool, volume_id, b"x" * (4 * MIB))
    pool.clone_volume(volume_id, clone, 4 * MIB)
    before = _places(pool.backing(volume_id).path)
    assert _places(pool.backing(clone).path) == before
    assert all(shared for _, shared in before.values())
    write(pool, clone, b"y" * BLOCK, offset=2 * MIB)
    after = _places(pool.backing(clone).path)
    assert {block for block in before if before[block] != after[block]} == {2 * MIB}
    assert not after[2 * MIB][1]


def _places(path: Path) -> dict[int, tuple[int, bool]]:
    """Where each block of the file lies on the device, and whether another file shares it."""
    with path.open("rb") as file:
        extents = list(fiemap(file.fileno()))
    return {
        extent.logical + offset: (extent.physical + offset, bool(extent.flags & EXTENT_SHARED))
        for extent in extents
        for offset in range(0, extent.length, BLOCK)
    }
