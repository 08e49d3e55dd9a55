"""Volumes and snapshots of a directory pool, on a plain directory, tmpfs, XFS and btrfs."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from pools import BackingMissing, PoolFull, ShrinkRefused, SizeMismatch, SizeTooLarge
from pools.directory import DirectoryPool
from tests.pools.support import MIB, names, read, write


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


def test_create_again_keeps_the_bytes(pool: DirectoryPool, volume: UUID) -> None:
    before = read(pool, volume)
    pool.create(volume, MIB)
    assert read(pool, volume) == before


def test_create_again_with_another_size_is_refused(pool: DirectoryPool, volume: UUID) -> None:
    before = read(pool, volume)
    with pytest.raises(SizeMismatch) as refused:
        pool.create(volume, 2 * MIB)
    assert (refused.value.id, refused.value.size, refused.value.wanted) == (volume, MIB, 2 * MIB)
    assert read(pool, volume) == before


def test_what_was_deleted_reads_as_zeros(pool: DirectoryPool, volume: UUID) -> None:
    pool.delete_volume(volume)
    with pytest.raises(BackingMissing):
        pool.backing(volume)
    pool.delete_volume(volume)
    pool.create(volume, MIB)
    assert read(pool, volume) == bytes(MIB)


def test_clone_is_independent_and_padded_with_zeros(pool: DirectoryPool, volume: UUID) -> None:
    before, clone = read(pool, volume), uuid4()
    pool.clone_volume(volume, clone, 2 * MIB)
    write(pool, volume, b"later")
    assert read(pool, clone) == before + bytes(MIB)
    write(pool, clone, b"clone")
    assert read(pool, volume)[:5] == b"later"
    pool.delete_volume(volume)
    assert read(pool, clone) == b"clone" + before[5:] + bytes(MIB)


def test_clone_again_keeps_the_clone(pool: DirectoryPool, volume: UUID) -> None:
    clone = uuid4()
    pool.clone_volume(volume, clone, MIB)
    write(pool, clone, b"mine")
    pool.clone_volume(volume, clone, MIB)
    assert read(pool, clone)[:4] == b"mine"


def test_clone_smaller_than_its_source_is_refused(pool: DirectoryPool, volume: UUID) -> None:
    before = names(pool)
    with pytest.raises(ShrinkRefused):
        pool.clone_volume(volume, uuid4(), MIB - 512)
    assert names(pool) == before


def test_clone_of_a_sparse_volume_is_sparse(pool: DirectoryPool, volume: UUID) -> None:
    pool.resize(volume, 64 * MIB)
    clone = uuid4()
    pool.clone_volume(volume, clone, 64 * MIB)
    assert pool.backing(clone).path.stat().st_blocks * 512 <= MIB


def test_snapshot_keeps_the_moment(pool: DirectoryPool, volume: UUID) -> None:
    before, snapshot, clone = read(pool, volume), uuid4(), uuid4()
    pool.snapshot(volume, snapshot)
    write(pool, volume, b"later")
    pool.snapshot(volume, snapshot)
    pool.clone_snapshot(snapshot, clone, MIB)
    assert read(pool, clone) == before


def test_snapshot_outlives_its_volume_and_is_deleted_by_itself(pool: DirectoryPool, volume: UUID) -> None:
    before, snapshot, clone = read(pool, volume), uuid4(), uuid4()
    pool.snapshot(volume, snapshot)
    pool.delete_volume(volume)
    pool.clone_snapshot(snapshot, clone, MIB)
    pool.delete_snapshot(snapshot)
    pool.delete_snapshot(snapshot)
    assert read(pool, clone) == before
    assert names(pool) == {f"volumes/{clone}.raw"}


def test_revert_brings_the_bytes_back(pool: DirectoryPool, volume: UUID) -> None:
    before, snapshot = read(pool, volume), uuid4()
    pool.snapshot(volume, snapshot)
    for later in (b"later", b"later still"):
        write(pool, volume, later, offset=MIB // 2)
        pool.revert(volume, snapshot)
        assert read(pool, volume) == before


def test_revert_of_a_grown_volume_keeps_its_size(pool: DirectoryPool, volume: UUID) -> None:
    before, snapshot = read(pool, volume), uuid4()
    pool.snapshot(volume, snapshot)
    pool.resize(volume, 2 * MIB)
    write(pool, volume, b"beyond", offset=2 * MIB - 6)
    pool.revert(volume, snapshot)
    assert read(pool, volume) == before + bytes(MIB)


def test_resize_grows_with_zeros_and_never_shrinks(pool: DirectoryPool, volume: UUID) -> None:
    before = read(pool, volume)
    pool.resize(volume, 2 * MIB)
    pool.resize(volume, 2 * MIB)
    with pytest.raises(ShrinkRefused) as refused:
        pool.resize(volume, MIB)
    assert (refused.value.size, refused.value.wanted) == (2 * MIB, MIB)
    assert read(pool, volume) == before + bytes(MIB)


@pytest.mark.parametrize("missing", ["volume", "snapshot"])
def test_what_is_missing_is_named(pool: DirectoryPool, volume: UUID, missing: str) -> None:
    other, before = uuid4(), names(pool)
    calls = {
        "volume": [
            lambda: pool.backing(other),
            lambda: pool.resize(other, MIB),
            lambda: pool.clone_volume(other, uuid4(), MIB),
            lambda: pool.snapshot(other, uuid4()),
        ],
        "snapshot": [lambda: pool.clone_snapshot(other, uuid4(), MIB), lambda: pool.revert(volume, other)],
    }
    for call in calls[missing]:
        with pytest.raises(BackingMissing, match=f"no {missing} {other}"):
            call()
    assert names(pool) == before


def test_revert_of_a_missing_volume_makes_none(pool: DirectoryPool, volume: UUID) -> None:
    snapshot = uuid4()
    pool.snapshot(volume, snapshot)
    pool.delete_volume(volume)
    with pytest.raises(BackingMissing, match=f"no volume {volume}"):
        pool.revert(volume, snapshot)
    assert names(pool) == {f"snapshots/{snapshot}.raw"}


def test_a_symbolic_link_is_no_volume(pool: DirectoryPool, tmp_path: Path) -> None:
    elsewhere, volume_id = tmp_path / "elsewhere", uuid4()
    elsewhere.write_bytes(bytes(MIB))
    (pool.path / "volumes" / f"{volume_id}.raw").symlink_to(elsewhere)
    with pytest.raises(BackingMissing):
        pool.backing(volume_id)
    assert pool.inventory() == []


def test_inventory_and_usage_say_what_is_there(pool: DirectoryPool, volume: UUID) -> None:
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
    assert all(0 < item.allocated < MIB for item in items)
    usage = pool.usage()
    assert usage.allocated == sum(item.allocated for item in items)
    assert 0 < usage.free < usage.size


def test_volumes_in_parallel_threads(pool: DirectoryPool) -> None:
    def live(volume_id: UUID) -> None:
        snapshot, clone = uuid4(), uuid4()
        pool.create(volume_id, MIB)
        write(pool, volume_id, volume_id.bytes)
        pool.snapshot(volume_id, snapshot)
        write(pool, volume_id, bytes(16))
        pool.revert(volume_id, snapshot)
        pool.clone_snapshot(snapshot, clone, MIB)
        pool.sweep()
        pool.delete_snapshot(snapshot)
        pool.delete_volume(clone)

    volumes = [uuid4() for _ in range(8)]
    threads = [threading.Thread(target=live, args=(volume_id,)) for volume_id in volumes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(pool) == {f"volumes/{volume_id}.raw" for volume_id in volumes}
    assert all(read(pool, volume_id)[:16] == volume_id.bytes for volume_id in volumes)


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
