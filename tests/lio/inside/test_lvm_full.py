"""Thin pools that run out of space, or of room for their metadata."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from pools import PoolFull, PoolUnusable, SizeTooLarge
from pools.lvm import LvmPool
from pools.lvm_thinpool import METADATA_LIMIT
from tests.pools.behaviour import items
from tests.pools.support import MIB, read, write
from tests.support.thinpools import ThinPool, lvm, thin_pool
from tests.support.thinvolumes import CHUNK, EXTENT, emptied


@pytest.fixture
def small(test_kernel: None, tmp_path: Path) -> Iterator[ThinPool]:
    with thin_pool(tmp_path, "small-group", 24 * MIB, metadata=2 * MIB) as made:
        yield made


@pytest.fixture
def pool(small: ThinPool) -> LvmPool:
    pool = LvmPool("default", small.path, room_for=0)
    pool.activate()
    return pool


def fill(pool: LvmPool, volume_id: UUID) -> int:
    """Write to the volume, as a target does, until the thin pool refuses; how much it took."""
    path, content = pool.backing(volume_id).path, mmap.mmap(-1, CHUNK)
    content.write(b"x" * CHUNK)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_DIRECT), "r+b", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            write_for_ever(file.fileno(), content)
        return os.lseek(file.fileno(), 0, os.SEEK_CUR)


def write_for_ever(fd: int, content: mmap.mmap) -> None:
    while True:
        os.write(fd, content)


def new_work(pool: LvmPool, volume: UUID, snapshot: UUID) -> list[Callable[[], object]]:
    return [
        lambda: pool.create(uuid4(), EXTENT),
        lambda: pool.clone_volume(volume, uuid4(), 16 * EXTENT),
        lambda: pool.clone_snapshot(snapshot, uuid4(), 17 * EXTENT),
        lambda: pool.snapshot(volume, uuid4()),
        lambda: pool.revert(volume, snapshot),
        lambda: pool.resize(volume, 17 * EXTENT),
    ]


def refuses(pool: LvmPool, volume: UUID, snapshot: UUID, reason: str) -> None:
    before = items(pool)
    for work in new_work(pool, volume, snapshot):
        with pytest.raises(PoolFull, match=reason):
            work()
    assert items(pool) == before
    pool.create(volume, 16 * EXTENT)  # what is there already is no new work
    pool.snapshot(volume, snapshot)
    pool.resize(volume, 16 * EXTENT)


def test_out_of_data(pool: LvmPool) -> None:
    """Writes fail at once, nobody hangs; new work is refused before that; deleting gives space and life back."""
    volume, snapshot, other = uuid4(), uuid4(), uuid4()
    pool.create(volume, 16 * EXTENT)
    pool.create(other, EXTENT)
    write(pool, volume, b"kept", offset=15 * EXTENT)
    pool.snapshot(volume, snapshot)
    pool.reserve = 24 * MIB
    refuses(pool, volume, snapshot, "no space left$")
    pool.reserve = 0
    pool.snapshot(other, uuid4())
    assert fill(pool, volume) == 24 * MIB - CHUNK
    usage = pool.usage()
    assert (usage.free, usage.allocated) == (0, usage.size)
    refuses(pool, volume, snapshot, "no space left$")
    again = LvmPool("default", pool.path, pool_id=pool.pool_id, room_for=0)
    again.activate()
    assert read(again, volume)[:CHUNK] == b"x" * CHUNK
    again.delete_volume(volume)
    assert again.usage().free == 24 * MIB - CHUNK
    write(again, other, b"alive")
    clone = uuid4()
    again.clone_snapshot(snapshot, clone, 16 * EXTENT)
    assert read(again, clone)[15 * EXTENT :][:4] == b"kept"
    emptied(again)
    assert again.usage().allocated == 0


def test_a_size_that_no_volume_can_have_is_refused(pool: LvmPool) -> None:
    with pytest.raises(SizeTooLarge, match=r"8191\.99PiB") as refused:
        pool.create(uuid4(), (1 << 63) - EXTENT)
    assert refused.value.wanted == (1 << 63) - EXTENT
    assert items(pool) == set()


def test_out_of_metadata(pool: LvmPool, small: ThinPool) -> None:
    """New work is refused at the limit; past the end the thin pool stops changing, and that is said with what to do."""
    volume, snapshot = uuid4(), uuid4()
    pool.create(volume, 16 * EXTENT)
    write(pool, volume, b"kept")
    pool.snapshot(volume, snapshot)
    crowd = Crowd(small)
    crowd.grow(lambda: pool.usage().metadata_percent >= METADATA_LIMIT)
    refuses(pool, volume, snapshot, r"no space left: its metadata is 8\d\.\d % full; lvextend --poolmetadatasize")
    pool.delete_snapshot(snapshot)
    crowd.grow(lambda: False)
    with pytest.raises(PoolUnusable, match="lvconvert --repair"):
        pool.usage()
    with pytest.raises(PoolUnusable, match="lvconvert --repair"):
        pool.create(uuid4(), EXTENT)
    with pytest.raises(PoolUnusable, match="lvconvert --repair"):
        LvmPool("default", small.path, pool_id=pool.pool_id).activate()
    assert read(pool, volume)[:4] == b"kept"
    lvm("lvchange", "--activate", "n", small.group)
    lvm("lvconvert", "--repair", "--yes", str(small.path))
    lvm("lvextend", "--poolmetadatasize", "+4m", str(small.path))
    again = LvmPool("default", small.path, pool_id=pool.pool_id, room_for=0)
    again.activate()
    assert read(again, volume)[:4] == b"kept"
    again.create(uuid4(), EXTENT)


class Crowd:
    """Thin devices that LVM knows nothing of: each takes a block of the metadata."""

    def __init__(self, small: ThinPool) -> None:
        self._device = f"{small.group.replace('-', '--')}-{small.name}-tpool"
        self._next = 100_000

    def grow(self, enough: Callable[[], bool]) -> None:
        """Until it is enough, or the thin pool refuses."""
        while not enough():
            for _ in range(16):
                self._next += 1
                try:
                    tell(self._device, f"create_thin {self._next}")
                except OSError:
                    return


def tell(device: str, message: str) -> None:
    """dmsetup(8) message, for very many of them: linux/dm-ioctl.h, DM_TARGET_MSG."""
    header = struct.pack("=3I3Ii3IQ128s129s7x", 4, 0, 0, 1024, 312, 1, 0, 0, 0, 0, 0, device.encode(), b"")
    with open("/dev/mapper/control", "r+b", buffering=0) as control:
        fcntl.ioctl(control, 0xC138FD0E, bytearray(header + bytes(8) + message.encode()).ljust(1024, b"\0"))


def test_room_is_looked_for_once_a_moment_and_its_lack_every_time(pool: LvmPool) -> None:
    often = LvmPool("default", pool.path, pool_id=pool.pool_id, room_for=60)
    often.activate()
    often.create(uuid4(), 4 * MIB)
    often.reserve = often.usage().size
    often.create(uuid4(), 4 * MIB)  # there was room a moment ago
    hurried = LvmPool("default", pool.path, pool_id=pool.pool_id, room_for=60)
    hurried.activate()
    hurried.reserve = often.reserve + 1
    with pytest.raises(PoolFull):
        hurried.create(uuid4(), 4 * MIB)
    hurried.reserve = 0
    hurried.create(uuid4(), 4 * MIB)
