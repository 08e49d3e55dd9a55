"""What every pool does, whatever keeps its bytes: one suite, run for each driver.

A driver's tests have a class derived from it and a fixture `pool`, an activated pool with nothing in it.
"""

from __future__ import annotations

import os
import threading
from uuid import UUID, uuid4

import pytest

from pools import BackingMissing, Pool, ShrinkRefused, SizeMismatch
from tests.pools.support import MIB, read, write


class PoolBehaviour:
    unit = MIB
    """A size that the pool need not round."""
    crowd = 8
    """Threads at once."""

    @pytest.fixture
    def volume(self, pool: Pool) -> UUID:
        """A volume of one unit with something in its middle."""
        volume_id = uuid4()
        pool.create(volume_id, self.unit)
        write(pool, volume_id, b"before" * 1000, offset=self.unit // 2)
        return volume_id

    def test_new_volume_reads_as_zeros_and_takes_no_space(self, pool: Pool) -> None:
        volume_id, before = uuid4(), pool.usage().allocated
        pool.create(volume_id, 3 * self.unit)
        assert pool.backing(volume_id).size == 3 * self.unit
        assert read(pool, volume_id) == bytes(3 * self.unit)
        assert pool.usage().allocated == before

    def test_sizes_are_rounded_up(self, pool: Pool) -> None:
        volume_id = uuid4()
        for _ in range(2):
            pool.create(volume_id, self.unit + 512)
        size = pool.backing(volume_id).size
        assert self.unit + 512 <= size < self.unit + 512 + pool.granularity
        assert size % pool.granularity == 0
        pool.resize(volume_id, size)
        assert pool.backing(volume_id).size == size

    def test_create_again_keeps_the_bytes(self, pool: Pool, volume: UUID) -> None:
        before = read(pool, volume)
        pool.create(volume, self.unit)
        assert read(pool, volume) == before

    def test_create_again_with_another_size_is_refused(self, pool: Pool, volume: UUID) -> None:
        before = read(pool, volume)
        with pytest.raises(SizeMismatch) as refused:
            pool.create(volume, 2 * self.unit)
        assert (refused.value.id, refused.value.size, refused.value.wanted) == (volume, self.unit, 2 * self.unit)
        assert read(pool, volume) == before

    def test_what_was_deleted_reads_as_zeros(self, pool: Pool, volume: UUID) -> None:
        pool.delete_volume(volume)
        with pytest.raises(BackingMissing):
            pool.backing(volume)
        pool.delete_volume(volume)
        pool.create(volume, self.unit)
        assert read(pool, volume) == bytes(self.unit)

    def test_clone_is_independent_and_padded_with_zeros(self, pool: Pool, volume: UUID) -> None:
        before, clone = read(pool, volume), uuid4()
        pool.clone_volume(volume, clone, 2 * self.unit)
        write(pool, volume, b"later")
        assert read(pool, clone) == before + bytes(self.unit)
        write(pool, clone, b"clone")
        assert read(pool, volume)[:5] == b"later"
        pool.delete_volume(volume)
        assert read(pool, clone) == b"clone" + before[5:] + bytes(self.unit)

    def test_clone_again_keeps_the_clone(self, pool: Pool, volume: UUID) -> None:
        clone = uuid4()
        pool.clone_volume(volume, clone, self.unit)
        write(pool, clone, b"mine")
        pool.clone_volume(volume, clone, self.unit)
        assert read(pool, clone)[:4] == b"mine"
        with pytest.raises(SizeMismatch):
            pool.clone_volume(volume, clone, 2 * self.unit)

    def test_clone_smaller_than_its_source_is_refused(self, pool: Pool, volume: UUID) -> None:
        pool.resize(volume, 2 * self.unit)
        before = items(pool)
        with pytest.raises(ShrinkRefused):
            pool.clone_volume(volume, uuid4(), self.unit)
        assert items(pool) == before

    def test_clone_of_a_sparse_volume_is_sparse(self, pool: Pool, volume: UUID) -> None:
        pool.resize(volume, 16 * self.unit)
        before = pool.usage().allocated
        pool.clone_volume(volume, uuid4(), 16 * self.unit)
        assert pool.usage().allocated - before <= self.unit

    def test_snapshot_keeps_the_moment(self, pool: Pool, volume: UUID) -> None:
        before, snapshot, clone = read(pool, volume), uuid4(), uuid4()
        pool.snapshot(volume, snapshot)
        write(pool, volume, b"later")
        pool.snapshot(volume, snapshot)
        pool.clone_snapshot(snapshot, clone, self.unit)
        assert read(pool, clone) == before

    def test_snapshot_outlives_its_volume_and_is_deleted_by_itself(self, pool: Pool, volume: UUID) -> None:
        before, snapshot, clone = read(pool, volume), uuid4(), uuid4()
        pool.snapshot(volume, snapshot)
        pool.delete_volume(volume)
        pool.clone_snapshot(snapshot, clone, self.unit)
        pool.delete_snapshot(snapshot)
        pool.delete_snapshot(snapshot)
        assert read(pool, clone) == before
        assert items(pool) == {("volume", clone, self.unit)}

    def test_revert_brings_the_bytes_back(self, pool: Pool, volume: UUID) -> None:
        before, snapshot = read(pool, volume), uuid4()
        pool.snapshot(volume, snapshot)
        for later in (b"later", b"later still"):
            write(pool, volume, later, offset=self.unit // 2)
            pool.revert(volume, snapshot)
            assert read(pool, volume) == before
        assert items(pool) == {("volume", volume, self.unit), ("snapshot", snapshot, self.unit)}

    def test_revert_of_a_grown_volume_keeps_its_size(self, pool: Pool, volume: UUID) -> None:
        before, snapshot = read(pool, volume), uuid4()
        pool.snapshot(volume, snapshot)
        pool.resize(volume, 2 * self.unit)
        write(pool, volume, b"beyond", offset=2 * self.unit - 6)
        pool.revert(volume, snapshot)
        assert read(pool, volume) == before + bytes(self.unit)
        assert items(pool) == {("volume", volume, 2 * self.unit), ("snapshot", snapshot, self.unit)}

    def test_resize_grows_with_zeros_and_never_shrinks(self, pool: Pool, volume: UUID) -> None:
        before = read(pool, volume)
        pool.resize(volume, 2 * self.unit)
        pool.resize(volume, 2 * self.unit)
        with pytest.raises(ShrinkRefused) as refused:
            pool.resize(volume, self.unit)
        assert (refused.value.size, refused.value.wanted) == (2 * self.unit, self.unit)
        assert read(pool, volume) == before + bytes(self.unit)

    @pytest.mark.parametrize("missing", ["volume", "snapshot"])
    def test_what_is_missing_is_named(self, pool: Pool, volume: UUID, missing: str) -> None:
        other, before = uuid4(), items(pool)
        calls = {
            "volume": [
                lambda: pool.backing(other),
                lambda: pool.resize(other, self.unit),
                lambda: pool.clone_volume(other, uuid4(), self.unit),
                lambda: pool.snapshot(other, uuid4()),
            ],
            "snapshot": [lambda: pool.clone_snapshot(other, uuid4(), self.unit), lambda: pool.revert(volume, other)],
        }
        for call in calls[missing]:
            with pytest.raises(BackingMissing, match=f"no {missing} {other}"):
                call()
        assert items(pool) == before

    def test_revert_of_a_missing_volume_makes_none(self, pool: Pool, volume: UUID) -> None:
        snapshot = uuid4()
        pool.snapshot(volume, snapshot)
        pool.delete_volume(volume)
        with pytest.raises(BackingMissing, match=f"no volume {volume}"):
            pool.revert(volume, snapshot)
        assert items(pool) == {("snapshot", snapshot, self.unit)}

    def test_inventory_and_usage_say_what_is_there(self, pool: Pool, volume: UUID) -> None:
        snapshot, empty = uuid4(), pool.usage()
        pool.snapshot(volume, snapshot)
        pool.resize(volume, 2 * self.unit)
        os.sync()
        assert items(pool) == {("volume", volume, 2 * self.unit), ("snapshot", snapshot, self.unit)}
        (found,) = (item for item in pool.inventory() if item.kind == "volume")
        assert found.allocated is not None
        assert 0 < found.allocated < self.unit
        write(pool, volume, b"x" * self.unit, offset=self.unit)
        os.sync()
        usage = pool.usage()
        assert usage.allocated >= empty.allocated + self.unit
        assert 0 < usage.free < usage.size
        assert 0 <= usage.metadata_percent < 100

    def test_volumes_in_parallel_threads(self, pool: Pool) -> None:
        def live(volume_id: UUID) -> None:
            snapshot, clone = uuid4(), uuid4()
            pool.create(volume_id, self.unit)
            write(pool, volume_id, volume_id.bytes)
            pool.snapshot(volume_id, snapshot)
            write(pool, volume_id, bytes(16))
            pool.revert(volume_id, snapshot)
            pool.clone_snapshot(snapshot, clone, self.unit)
            pool.sweep()
            pool.delete_snapshot(snapshot)
            pool.delete_volume(clone)

        volumes = [uuid4() for _ in range(self.crowd)]
        threads = [threading.Thread(target=live, args=(volume_id,)) for volume_id in volumes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert items(pool) == {("volume", volume_id, self.unit) for volume_id in volumes}
        assert all(read(pool, volume_id)[:16] == volume_id.bytes for volume_id in volumes)
        assert pool.sweep() == []


def items(pool: Pool) -> set[tuple[str, UUID, int]]:
    """All volumes and snapshots of the pool, and their sizes."""
    return {(item.kind, item.id, item.size) for item in pool.inventory()}
