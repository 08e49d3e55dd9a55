"""Volumes and snapshots of both drivers as a site has them: LVM thin volumes, and files on XFS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from blockdev.locks import FileLock
from pools import PoolFailed
from pools.directory import DirectoryPool
from pools.lvm import LvmPool
from tests.pools.behaviour import PoolBehaviour, items
from tests.pools.support import read, write
from tests.support.killing import in_forks
from tests.support.thinpools import ThinPool
from tests.support.thinvolumes import EXTENT, emptied, running_udevd


@pytest.fixture
def udev() -> Iterator[None]:
    with running_udevd():
        yield


class TestLvm(PoolBehaviour):
    unit = EXTENT
    crowd = 2

    @pytest.fixture
    def pool(self, active: LvmPool) -> Iterator[LvmPool]:
        yield active
        emptied(active)

    def test_many_processes_at_once(self, pool: LvmPool) -> None:
        """They queue for the volume group's lock, and each finds its own."""
        sources = [uuid4() for _ in range(2)]
        for source in sources:
            pool.create(source, EXTENT)
            write(pool, source, source.bytes)

        def live(source: UUID) -> None:
            snapshot, clone = uuid4(), uuid4()
            pool.snapshot(source, snapshot)
            pool.clone_snapshot(snapshot, clone, 2 * EXTENT)
            assert read(pool, clone)[:16] == source.bytes
            assert pool.changed_extents(clone, source) == []
            pool.delete_snapshot(snapshot)
            pool.delete_volume(clone)

        with in_forks(*(lambda source=source: live(source) for source in sources)):
            pool.sweep()
        assert items(pool) == {("volume", source, EXTENT) for source in sources}

    def test_a_command_that_has_to_wait_too_long_is_given_up(self, pool: LvmPool, pool_group: ThinPool) -> None:
        hasty, volume_id = LvmPool("default", pool_group.path, pool_id=pool.pool_id, deadline=2.0), uuid4()
        hasty.activate()
        with (
            FileLock(Path("/run/lock/lvm") / f"V_{pool_group.group}"),
            pytest.raises(PoolFailed, match="SIGTERM, not done within 2 s"),
        ):
            hasty.create(volume_id, EXTENT)
        assert items(pool) == set()
        hasty.create(volume_id, EXTENT)
        assert items(pool) == {("volume", volume_id, EXTENT)}

    def test_with_udev_devices_are_made_by_udev(self, pool: LvmPool, udev: None) -> None:
        volume_id, snapshot, clone = uuid4(), uuid4(), uuid4()
        pool.create(volume_id, EXTENT)
        write(pool, volume_id, b"data")
        assert pool.backing(volume_id).path.is_symlink()  # LVM itself makes nodes
        pool.snapshot(volume_id, snapshot)
        pool.clone_snapshot(snapshot, clone, 2 * EXTENT)
        pool.revert(volume_id, snapshot)
        assert read(pool, volume_id)[:4] == read(pool, clone)[:4] == b"data"
        assert pool.changed_extents(clone, snapshot) == []


class TestDirectoryOnXfs(PoolBehaviour):
    @pytest.fixture
    def pool(self, xfs: Path) -> DirectoryPool:
        path = xfs / f"pool-{uuid4()}"
        path.mkdir()
        pool = DirectoryPool("default", path)
        pool.activate()
        return pool
