"""Which thin pools become pools, and what activation puts right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from blockdev.command import run
from pools import BackingMissing, PoolFailed, PoolUnusable, open_pool
from pools.lvm import LvmPool
from tests.pools.support import read, write
from tests.support.thinpools import ThinPool, lvm, thin_pool
from tests.support.thinvolumes import EXTENT, emptied, listed


@pytest.fixture(scope="module")
def group(test_kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    with thin_pool(tmp_path_factory.mktemp("lvm"), "own-group", 64 << 20) as made:
        yield made


@pytest.fixture
def fresh(group: ThinPool) -> Iterator[ThinPool]:
    """A thin pool that nobody has made a pool."""
    yield group
    lvm("lvchange", "--activate", "y", str(group.path))
    for tag in filter(None, tags(group).split(",")):
        lvm("lvchange", "--deltag", tag, str(group.path))


def activate(thin_pool: ThinPool, pool_id: UUID | None = None) -> LvmPool:
    pool = LvmPool("default", thin_pool.path, pool_id=pool_id)
    pool.activate()
    return pool


def tags(thin_pool: ThinPool) -> str:
    return listed(thin_pool.group, "lv_tags")[thin_pool.name][0]


def test_a_thin_pool_becomes_a_pool_and_is_found_again(fresh: ThinPool) -> None:
    lvm("lvchange", "--errorwhenfull", "n", str(fresh.path))
    LvmPool("default", fresh.path).examine()
    assert listed(fresh.group, "lv_tags", "lv_when_full")[fresh.name] == ["", "queue"]
    pool = activate(fresh)
    assert listed(fresh.group, "lv_tags", "lv_when_full")[fresh.name] == [f"stratus-pool-{pool.pool_id}", "error"]
    assert pool.live_clone
    assert pool.granularity == EXTENT
    assert pool.inventory() == []
    for pool_id in (None, pool.pool_id):
        again = open_pool("default", "lvm", fresh.path, pool_id)
        again.examine()
        again.activate()
        assert again.pool_id == pool.pool_id


def test_all_that_start_at_once_agree(fresh: ThinPool) -> None:
    pools = [LvmPool("default", fresh.path) for _ in range(4)]
    threads = [threading.Thread(target=pool.activate) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {f"stratus-pool-{pool.pool_id}" for pool in pools} == {tags(fresh)}


def test_what_is_not_the_pool_is_refused_and_left_alone(fresh: ThinPool) -> None:
    with pytest.raises(PoolUnusable, match="is it the right thin pool"):
        activate(fresh, uuid4())
    assert tags(fresh) == ""
    found, other = activate(fresh).pool_id, uuid4()
    with pytest.raises(PoolUnusable, match=f"is pool {found}, not {other}"):
        activate(fresh, other)
    lvm("lvchange", "--addtag", f"stratus-pool-{other}", str(fresh.path))
    with pytest.raises(PoolUnusable, match="name no one pool"):
        activate(fresh, found)


def test_a_pool_that_lost_its_tag_is_refused(fresh: ThinPool) -> None:
    pool = activate(fresh)
    pool.create(uuid4(), EXTENT)
    lvm("lvchange", "--deltag", f"stratus-pool-{pool.pool_id}", str(fresh.path))
    with pytest.raises(PoolUnusable, match="has lost its tag"):
        activate(fresh)
    lvm("lvchange", "--addtag", f"stratus-pool-{pool.pool_id}", str(fresh.path))
    emptied(pool)


def test_what_is_no_thin_pool_is_refused(fresh: ThinPool) -> None:
    lvm("lvcreate", "--extents", "1", "--wipesignatures", "n", "--name", "plain", fresh.group)
    for path, reason in (
        (f"{fresh.group}/plain", "is no thin pool"),
        (f"{fresh.group}/nothing", "is missing"),
        ("no-group/pool", 'Volume group "no-group" not found'),
    ):
        with pytest.raises(PoolUnusable, match=reason):
            LvmPool("default", Path(path)).activate()
    lvm("lvremove", "--yes", f"{fresh.group}/plain")
    for path in ("pool", "/dev/group/pool", "group/-pool", "group/pool/more", "gr oup/pool"):
        with pytest.raises(PoolUnusable, match="is not VOLUME_GROUP/THIN_POOL"):
            LvmPool("default", Path(path))


@pytest.mark.parametrize(
    ("wrong", "right", "reason"),
    [
        (("--zero", "n"), ("--zero", "y"), "what was deleted could be read"),
        (("--discards", "ignore"), ("--discards", "passdown"), "ignores discards"),
    ],
)
def test_a_thin_pool_with_dangerous_settings_is_refused(
    fresh: ThinPool, wrong: tuple[str, str], right: tuple[str, str], reason: str
) -> None:
    lvm("lvchange", "--activate", "n", str(fresh.path))
    lvm("lvchange", *wrong, str(fresh.path))
    for look in (LvmPool("default", fresh.path).examine, LvmPool("default", fresh.path).activate):
        with pytest.raises(PoolUnusable, match=reason):
            look()
    assert tags(fresh) == ""
    lvm("lvchange", *right, str(fresh.path))
    activate(fresh)


def test_activation_starts_what_a_boot_has_not(fresh: ThinPool) -> None:
    pool, volumes, snapshot = activate(fresh), [uuid4(), uuid4()], uuid4()
    for volume_id in volumes:
        pool.create(volume_id, EXTENT)
    write(pool, volumes[0], b"data")
    pool.snapshot(volumes[0], snapshot)
    lvm("lvchange", "--activate", "n", fresh.group)
    assert not Path(f"/dev/{fresh.group}").exists()
    with pytest.raises(PoolUnusable, match="is not active"):
        pool.usage()
    LvmPool("default", fresh.path, pool_id=pool.pool_id).examine()
    assert {name for name, (active,) in listed(fresh.group, "lv_active").items() if active} == set()
    again = activate(fresh, pool.pool_id)
    active = {name for name, (active,) in listed(fresh.group, "lv_active").items() if active}
    assert active == {fresh.name, *(f"stratus-v-{id}" for id in volumes)}
    assert read(again, volumes[0])[:4] == b"data"
    lvm("lvchange", "--activate", "n", f"{fresh.group}/stratus-v-{volumes[0]}")
    assert read(again, volumes[0])[:4] == b"data"
    emptied(again)


def test_a_thin_pool_that_was_stopped_finds_nothing_gone(fresh: ThinPool) -> None:
    pool, volume_id = activate(fresh), uuid4()
    pool.create(volume_id, EXTENT)
    lvm("lvchange", "--activate", "n", fresh.group)
    acts: tuple[Callable[[], object], ...] = (
        lambda: pool.delete_volume(volume_id),
        lambda: pool.create(uuid4(), EXTENT),
        lambda: pool.snapshot(volume_id, uuid4()),
        lambda: pool.resize(volume_id, 2 * EXTENT),
        lambda: pool.backing(volume_id),
        pool.inventory,
        pool.sweep,
    )
    for act in acts:
        with pytest.raises(PoolUnusable, match="is not active"):
            act()
    emptied(activate(fresh, pool.pool_id))


def test_a_stale_node_of_a_device_is_not_believed(fresh: ThinPool) -> None:
    """Without udev a node outlives its device, and the number is given to the next one."""
    pool, volume_id, other = activate(fresh), uuid4(), uuid4()
    pool.create(volume_id, EXTENT)
    stale = pool.backing(volume_id).path
    run(["cp", "--archive", str(stale), f"{stale}.kept"], timeout=10)
    pool.delete_volume(volume_id)
    pool.create(other, EXTENT)
    taken = pool.backing(other).path
    assert taken.stat().st_rdev == Path(f"{stale}.kept").stat().st_rdev
    Path(f"{stale}.kept").rename(stale)
    with pytest.raises(BackingMissing):
        pool.backing(volume_id)
    stale.unlink()
    emptied(pool)


def test_a_metadata_snapshot_that_somebody_died_with_is_released(fresh: ThinPool) -> None:
    pool, volume_id = activate(fresh), uuid4()
    pool.create(volume_id, EXTENT)
    device = f"/dev/mapper/{fresh.group.replace('-', '--')}-{fresh.name}-tpool"
    run(["dmsetup", "message", device, "0", "reserve_metadata_snap"], timeout=10)
    activate(fresh, pool.pool_id)
    assert run(["dmsetup", "status", device], timeout=10).stdout.split()[6] == "-"
    emptied(pool)


def test_what_lvm_says_reaches_the_reader(fresh: ThinPool) -> None:
    pool, volume_id = activate(fresh), uuid4()
    lvm("lvcreate", "--thin", "--virtualsize", "4m", "--name", f"stratus-v-{volume_id}", str(fresh.path))
    with pytest.raises(PoolFailed, match=f'Volume "stratus-v-{volume_id}" already exists in volume group'):
        pool.create(volume_id, EXTENT)
    lvm("lvremove", "--yes", f"{fresh.group}/stratus-v-{volume_id}")
