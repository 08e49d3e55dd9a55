"""Volumes and snapshots of a directory pool, on a plain directory, tmpfs, XFS and btrfs."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from pools import BackingMissing, PoolFull, ShrinkRefused, SizeTooLarge
from pools.directory import DirectoryPool
from tests.pools.behaviour import PoolBehaviour
from tests.pools.support import MIB, names, read, write


class TestVolumes(PoolBehaviour):
    pass


@pytest.fixture
def volume(pool: DirectoryPool) -> UUID:
    """A volume of 1 MiB with something in its middle."""
    volume_id = uuid4()
    pool.create(volume_id, MIB)
    write(pool, volume_id, b"before" * 1000, offset=MIB // 2)
    return volume_id


def test_new_volume_is_sparse_private_and_reads_as_zeros(pool: DirectoryPool) -> None:
    volume_id = uuid4()
    pool.create(volume_id, 5 * MIB + 512)
    backing = pool.backing(volume_id)
    assert (backing.kind, backing.size) == ("file", 5 * MIB + 512)
    assert read(pool, volume_id) == bytes(backing.size)
    found = backing.path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_blocks == 0


def test_clone_smaller_than_its_source_is_refused(pool: DirectoryPool, volume: UUID) -> None:
    before = names(pool)
    with pytest.raises(ShrinkRefused):
        pool.clone_volume(volume, uuid4(), MIB - 512)
    assert names(pool) == before


def test_a_symbolic_link_is_no_volume(pool: DirectoryPool, tmp_path: Path) -> None:
    elsewhere, volume_id = tmp_path / "elsewhere", uuid4()
    elsewhere.write_bytes(bytes(MIB))
    (pool.path / "volumes" / f"{volume_id}.raw").symlink_to(elsewhere)
    with pytest.raises(BackingMissing):
        pool.backing(volume_id)
    assert pool.inventory() == []


def test_inventory_and_usage_count_what_is_ours(pool: DirectoryPool, volume: UUID) -> None:
    snapshot = uuid4()
    pool.snapshot(volume, snapshot)
    pool.resize(volume, 2 * MIB)
    (pool.path / "volumes" / "README").write_text("an admin's note")
    (pool.path / "volumes" / f"{str(uuid4()).upper()}.raw").write_text("not a name of ours")
    os.sync()
    items = pool.inventory()
    assert {(item.kind, item.id, item.size) for item in items} == {
        ("volume", volume, 2 * MIB),
        ("snapshot", snapshot, MIB),
    }
    allocated = [item.allocated or 0 for item in items]
    assert all(0 < size < MIB for size in allocated)
    assert pool.usage().allocated == sum(allocated)


def test_a_size_no_file_can_have_is_refused(tmp_path: Path) -> None:
    pool = DirectoryPool("default", tmp_path)
    pool.activate()
    with pytest.raises(SizeTooLarge, match=r"8191\.99PiB") as refused:
        pool.create(uuid4(), (1 << 63) - 1)
    assert refused.value.wanted == (1 << 63) - 1
    assert names(pool) == set()


def test_a_full_pool_says_so_and_keeps_nothing_begun(tmpfs: Path) -> None:
    pool, volume_id, snapshot = DirectoryPool("default", tmpfs), uuid4(), uuid4()
    pool.activate()
    pool.create(volume_id, 12 * MIB)
    write(pool, volume_id, b"x" * (6 * MIB))
    pool.snapshot(volume_id, snapshot)
    for copy in (
        lambda: pool.clone_volume(volume_id, uuid4(), 12 * MIB),
        lambda: pool.snapshot(volume_id, uuid4()),
        lambda: pool.revert(volume_id, snapshot),
    ):
        with pytest.raises(PoolFull):
            copy()
        assert names(pool) == {f"volumes/{volume_id}.raw", f"snapshots/{snapshot}.raw"}
    assert pool.usage().free >= 3 * MIB
    assert read(pool, volume_id) == b"x" * (6 * MIB) + bytes(6 * MIB)
