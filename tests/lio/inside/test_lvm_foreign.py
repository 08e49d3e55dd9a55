"""What is not ours, in the volume group and in the thin pool itself, is neither spoken of nor touched."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest

from pools import BackingMissing, PoolFailed
from pools.lvm import LvmPool
from tests.support.thinpools import ThinPool, lvm
from tests.support.thinvolumes import EXTENT, listed

STRANGE = UUID("11111111-2222-4333-8444-555555555555")
FIELDS = ("lv_uuid", "lv_size", "lv_tags", "lv_attr", "lv_time")


@pytest.fixture
def pool(pool_group: ThinPool) -> Iterator[LvmPool]:
    pool = LvmPool("default", pool_group.path)
    pool.activate()
    yield pool
    for item in pool.inventory():
        (pool.delete_volume if item.kind == "volume" else pool.delete_snapshot)(item.id)
    assert pool.inventory() == []


@pytest.fixture
def foreign(pool: LvmPool, pool_group: ThinPool) -> Iterator[set[str]]:
    """Logical volumes that lack the place, the tags or the name of ours, or one of the tags."""
    group, thin = pool_group.group, ("--thinpool", pool_group.name, "--virtualsize", "4m")
    tags = ("--addtag", "stratus", "--addtag", f"stratus-pool-{pool.pool_id}")
    kinds = {
        "database": ("--extents", "1", "--wipesignatures", "n"),
        f"stratus-s-{STRANGE}": ("--extents", "1", "--wipesignatures", "n", *tags),
        "machine": thin,
        "stratus-notes": (*thin, *tags),
        f"stratus-v-{STRANGE}": thin,
        f"stratus-t-{STRANGE}": (*thin, "--addtag", "stratus"),
        f"stratus-r-{STRANGE}": (*thin, "--addtag", f"stratus-pool-{pool.pool_id}"),
    }
    for name, arguments in kinds.items():
        lvm("lvcreate", "--name", name, *arguments, group)
    yield set(kinds)
    lvm("lvremove", "--yes", *(f"{group}/{name}" for name in kinds))


def test_what_is_not_ours_is_left_alone(pool: LvmPool, pool_group: ThinPool, foreign: set[str]) -> None:
    before = {name: fields for name, fields in listed(pool_group.group, *FIELDS).items() if name in foreign}
    assert set(before) == foreign
    volume_id, clone, snapshot = uuid4(), uuid4(), uuid4()
    pool.create(volume_id, EXTENT)
    pool.snapshot(volume_id, snapshot)
    pool.clone_snapshot(snapshot, clone, 2 * EXTENT)
    pool.revert(volume_id, snapshot)
    pool.resize(volume_id, 2 * EXTENT)
    assert {item.id for item in pool.inventory()} == {volume_id, clone, snapshot}
    pool.delete_volume(STRANGE)
    pool.delete_snapshot(STRANGE)
    assert pool.sweep() == []
    for act in (
        lambda: pool.backing(STRANGE),
        lambda: pool.resize(STRANGE, 2 * EXTENT),
        lambda: pool.snapshot(STRANGE, uuid4()),
        lambda: pool.clone_snapshot(STRANGE, uuid4(), EXTENT),
        lambda: pool.revert(volume_id, STRANGE),
        lambda: pool.changed_extents(volume_id, STRANGE),
    ):
        with pytest.raises(BackingMissing):
            act()
    for taken in (
        lambda: pool.create(STRANGE, EXTENT),
        lambda: pool.clone_volume(volume_id, STRANGE, 2 * EXTENT),
        lambda: pool.snapshot(volume_id, STRANGE),
    ):
        with pytest.raises(PoolFailed, match="already exists"):
            taken()
    pool.delete_volume(volume_id)
    pool.activate()
    now = listed(pool_group.group, *FIELDS)
    assert {name: now.get(name) for name in foreign} == before
    ours = {pool_group.name, f"stratus-v-{clone}", f"stratus-s-{snapshot}"}
    assert set(now) == foreign | ours
