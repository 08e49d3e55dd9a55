"""What changed between a snapshot and now, told by the thin pool's metadata."""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest

from blockdev.command import run
from pools import BackingMissing, Extent
from pools.lvm import LvmPool
from tests.pools.support import read, write
from tests.support.thinpools import ThinPool
from tests.support.thinvolumes import CHUNK, EXTENT, emptied


@pytest.fixture
def pool(active: LvmPool) -> Iterator[LvmPool]:
    yield active
    emptied(active)


@pytest.fixture
def volume(pool: LvmPool) -> UUID:
    volume_id = uuid4()
    pool.create(volume_id, 2 * EXTENT)
    write(pool, volume_id, random.Random(1).randbytes(EXTENT))
    return volume_id


def discard(pool: LvmPool, volume_id: UUID, offset: int, length: int) -> None:
    path = pool.backing(volume_id).path
    subprocess.run(["blkdiscard", "--offset", str(offset), "--length", str(length), path], check=True)


def held(pool_group: ThinPool) -> str:
    device = f"{pool_group.group.replace('-', '--')}-{pool_group.name}-tpool"
    return run(["dmsetup", "status", device], timeout=10).stdout.split()[6]


def test_each_kind_of_change_is_told(pool: LvmPool, pool_group: ThinPool, volume: UUID) -> None:
    snapshot = uuid4()
    pool.snapshot(volume, snapshot)
    assert pool.changed_extents(volume, snapshot) == []
    pool.resize(volume, 3 * EXTENT)
    write(pool, volume, b"changed", offset=CHUNK - 3)  # two chunks
    write(pool, volume, b"new", offset=EXTENT)
    discard(pool, volume, 10 * CHUNK, 2 * CHUNK)
    write(pool, volume, b"beyond", offset=3 * EXTENT - 6)
    assert pool.changed_extents(volume, snapshot) == [
        Extent(0, 2 * CHUNK, zeros=False),
        Extent(10 * CHUNK, 2 * CHUNK, zeros=True),
        Extent(EXTENT, CHUNK, zeros=False),
        Extent(3 * EXTENT - CHUNK, CHUNK, zeros=False),
    ]
    assert pool.changed_extents(snapshot, volume) == [
        Extent(0, 2 * CHUNK, zeros=False),
        Extent(10 * CHUNK, 2 * CHUNK, zeros=False),
        Extent(EXTENT, CHUNK, zeros=True),
    ]
    assert held(pool_group) == "-"


def test_outside_of_what_changed_the_bytes_are_equal(pool: LvmPool, volume: UUID) -> None:
    chance, snapshot, clone = random.Random(2), uuid4(), uuid4()
    pool.snapshot(volume, snapshot)
    for _ in range(12):
        offset = chance.randrange(0, 2 * EXTENT - 4096, 512)
        if chance.random() < 0.3:
            discard(pool, volume, offset - offset % CHUNK, CHUNK)
        else:
            write(pool, volume, chance.randbytes(chance.randrange(1, 4096)), offset)
    pool.clone_snapshot(snapshot, clone, 2 * EXTENT)
    rebuilt, now = bytearray(read(pool, clone)), read(pool, volume)
    changed = pool.changed_extents(volume, snapshot)
    for extent in changed:
        place = slice(extent.offset, extent.offset + extent.length)
        assert not extent.zeros or not any(now[place])
        rebuilt[place] = bytes(extent.length) if extent.zeros else now[place]
    assert rebuilt == now
    assert sum(extent.length for extent in changed) < EXTENT


def test_what_is_still_in_the_page_cache_counts(pool: LvmPool, volume: UUID) -> None:
    snapshot = uuid4()
    pool.snapshot(volume, snapshot)
    with pool.backing(volume).path.open("r+b") as file:
        file.write(b"cached")
        file.flush()
        assert pool.changed_extents(volume, snapshot) == [Extent(0, CHUNK, zeros=False)]


def test_many_ask_at_once_after_one_who_died(pool: LvmPool, pool_group: ThinPool, volume: UUID) -> None:
    """A thin pool has one metadata snapshot: they wait for one another, and let go of what a dead one has held."""
    snapshot, answers = uuid4(), list[list[Extent]]()
    pool.snapshot(volume, snapshot)
    write(pool, volume, b"changed")
    device = f"{pool_group.group.replace('-', '--')}-{pool_group.name}-tpool"
    pools = [LvmPool("default", pool_group.path, pool_id=pool.pool_id) for _ in range(3)]
    for each in pools:
        each.activate()
    run(["dmsetup", "message", device, "0", "reserve_metadata_snap"], timeout=10)
    threads = [
        threading.Thread(target=lambda each=each: answers.append(each.changed_extents(volume, snapshot)))
        for each in pools
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == 3 * [[Extent(0, CHUNK, zeros=False)]]
    assert held(pool_group) == "-"


def test_deleted_space_comes_back_at_once(pool: LvmPool, volume: UUID) -> None:
    snapshot, empty = uuid4(), pool.usage().allocated - EXTENT
    pool.snapshot(volume, snapshot)
    pool.changed_extents(volume, snapshot)
    discard(pool, volume, 0, EXTENT)
    assert pool.usage().allocated == empty + EXTENT
    pool.delete_snapshot(snapshot)
    assert pool.usage().allocated == empty
    write(pool, volume, b"x" * EXTENT)
    pool.delete_volume(volume)
    assert pool.usage().allocated == empty


def test_what_is_missing_is_named(pool: LvmPool, volume: UUID) -> None:
    for pair in ((volume, uuid4()), (uuid4(), volume)):
        with pytest.raises(BackingMissing):
            pool.changed_extents(*pair)
