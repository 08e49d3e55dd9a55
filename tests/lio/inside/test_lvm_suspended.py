"""What lvm(8) leaves suspended when it is killed in the middle: all I/O waits there until somebody resumes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from blockdev.command import run
from blockdev.locks import HOST_LOCKS, FileLock
from pools import PoolFailed
from pools.lvm import LvmPool
from pools.lvm_devices import node
from tests.pools.support import read, write
from tests.support.thinpools import ThinPool
from tests.support.thinvolumes import EXTENT, emptied

NEW = UUID("aaaaaaaa-1111-4111-8111-111111111111")
ACTS: dict[str, Callable[[LvmPool, UUID], object]] = {
    "activate": lambda pool, volume: pool.activate(),
    "sweep": lambda pool, volume: pool.sweep(),
    "backing": lambda pool, volume: pool.backing(volume),
    "snapshot": lambda pool, volume: pool.snapshot(volume, NEW),
    "clone": lambda pool, volume: pool.clone_volume(volume, NEW, 3 * EXTENT),
    "resize": lambda pool, volume: pool.resize(volume, 2 * EXTENT),
    "create": lambda pool, volume: pool.create(volume, EXTENT),
    "delete": lambda pool, volume: pool.delete_volume(volume),
}
LOOKS: dict[str, Callable[[LvmPool, UUID], object]] = {
    "usage": lambda pool, volume: pool.usage(),
    "inventory": lambda pool, volume: pool.inventory(),
    "foreign": lambda pool, volume: pool.foreign(),
}


@pytest.fixture
def pool(active: LvmPool) -> Iterator[LvmPool]:
    yield active
    for name in suspended():  # or whatever comes next waits for ever
        run(["dmsetup", "resume", name], timeout=10)
    emptied(active)


@pytest.fixture
def volume(pool: LvmPool) -> UUID:
    volume_id = uuid4()
    pool.create(volume_id, EXTENT)
    write(pool, volume_id, b"data")
    return volume_id


def suspend(*devices: Path) -> None:
    for device in devices:
        run(["dmsetup", "suspend", device.name], timeout=10)


def suspended() -> list[str]:
    states = {path.parent: path.read_text().strip() for path in Path("/sys/block").glob("dm-*/dm/suspended")}
    return [(home / "name").read_text().strip() for home, state in states.items() if state != "0"]


def device(pool_group: ThinPool, volume: UUID) -> Path:
    return node(pool_group.group, f"stratus-v-{volume}")


def parts(pool_group: ThinPool, *suffixes: str) -> list[Path]:
    return [node(pool_group.group, pool_group.name, suffix) for suffix in suffixes]


@pytest.mark.parametrize("act", ACTS)
def test_a_volume_is_resumed(pool: LvmPool, pool_group: ThinPool, volume: UUID, act: str) -> None:
    suspend(device(pool_group, volume))
    ACTS[act](pool, volume)
    assert suspended() == []
    if act != "delete":
        assert read(pool, volume)[:4] == b"data"
    pool.create(uuid4(), EXTENT)  # LVM and the thin pool are of one mind


@pytest.mark.parametrize("act", [*ACTS, *LOOKS])
def test_the_thin_pool_is_resumed(pool: LvmPool, pool_group: ThinPool, volume: UUID, act: str) -> None:
    """LVM suspends what lies above first, and resumes it last."""
    suspend(device(pool_group, volume), *parts(pool_group, "-tpool", "_tmeta", "_tdata"))
    (ACTS | LOOKS)[act](pool, volume)
    assert not {each.name for each in parts(pool_group, "-tpool", "_tmeta", "_tdata")} & set(suspended())
    pool.sweep()
    assert suspended() == []
    pool.create(uuid4(), EXTENT)


def test_only_the_thin_pool_is_suspended(pool: LvmPool, pool_group: ThinPool, volume: UUID) -> None:
    suspend(*parts(pool_group, "-tpool"))
    LvmPool("default", pool_group.path, pool_id=pool.pool_id).examine()  # changes nothing
    assert suspended() == [parts(pool_group, "-tpool")[0].name]
    assert pool.usage().allocated > 0
    assert suspended() == []
    assert read(pool, volume)[:4] == b"data"


def test_what_is_being_worked_on_is_left_alone(pool: LvmPool, pool_group: ThinPool, volume: UUID) -> None:
    name = device(pool_group, volume).name
    hasty = LvmPool("default", pool_group.path, pool_id=pool.pool_id, deadline=2.0)
    hasty.activate()
    suspend(device(pool_group, volume))
    with FileLock(HOST_LOCKS / f"{node(pool_group.group, pool_group.name).name}.{volume.int % 64:02}"):
        assert hasty.sweep() == []
        hasty.activate()
        with pytest.raises(PoolFailed, match="still locked"):
            hasty.backing(volume)
        assert suspended() == [name]
    hasty.sweep()
    assert suspended() == []
