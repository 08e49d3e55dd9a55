"""Work that is killed between any two commands, or in the middle of one, leaves all of it or nothing to be seen."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from blockdev.locks import HOST_LOCKS, FileLock
from pools.lvm import LvmPool
from tests.pools.behaviour import items
from tests.pools.support import read, write
from tests.support.killing import killed_after, killed_by_itself
from tests.support.thinpools import ThinPool, lvm
from tests.support.thinvolumes import EXTENT, emptied, listed

VOLUME, SNAPSHOT, NEW, NEWER = (UUID(f"{digit * 8}-1111-4111-8111-11111111111{digit}") for digit in "abcd")
ACTS: dict[str, Callable[[LvmPool], object]] = {
    "create": lambda pool: pool.create(NEW, EXTENT),
    "snapshot": lambda pool: pool.snapshot(VOLUME, NEWER),
    "resize": lambda pool: pool.resize(VOLUME, 3 * EXTENT),
    "delete": lambda pool: pool.delete_volume(VOLUME),
    "clone": lambda pool: pool.clone_volume(VOLUME, NEW, 3 * EXTENT),
    "revert": lambda pool: pool.revert(VOLUME, SNAPSHOT),
}


class Executioner:
    """The trace of a pool: kills its process when it is to run its command number `step`."""

    step = -1

    def __call__(self, command: str) -> None:
        if self.step == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.step -= 1


@pytest.fixture(scope="module")
def executioner() -> Executioner:
    return Executioner()


@pytest.fixture(scope="module")
def active(pool_group: ThinPool, executioner: Executioner) -> LvmPool:
    pool = LvmPool("default", pool_group.path, trace=executioner)
    pool.activate()
    return pool


@pytest.fixture
def pool(active: LvmPool) -> Iterator[LvmPool]:
    """A pool with a volume that has changed and grown since its snapshot."""
    active.create(VOLUME, EXTENT)
    write(active, VOLUME, b"before")
    active.snapshot(VOLUME, SNAPSHOT)
    write(active, VOLUME, b"later!")
    active.resize(VOLUME, 2 * EXTENT)
    yield active
    emptied(active)
    assert suspended() == []


def seen(pool: LvmPool) -> dict[tuple[str, UUID, int], bytes]:
    """What is there, and the first bytes of the volumes."""
    return {each: read(pool, each[1])[:6] if each[0] == "volume" else b"" for each in items(pool)}


def names(pool_group: ThinPool) -> set[str]:
    return set(listed(pool_group.group)) - {pool_group.name}


def suspended() -> list[str]:
    states = {path.parents[1].name: path.read_text().strip() for path in Path("/sys/block").glob("dm-*/dm/suspended")}
    return [name for name, state in states.items() if state != "0"]


@pytest.mark.parametrize("acts", [["create", "snapshot", "resize", "delete"], ["clone"], ["revert"]], ids="+".join)
def test_killed_between_any_two_commands(
    pool: LvmPool, pool_group: ThinPool, executioner: Executioner, acts: list[str]
) -> None:
    for act in acts:
        killed_ever_later(pool, executioner, ACTS[act])
    assert pool.sweep() == []
    assert {name[10:] for name in names(pool_group)} == {str(id) for _, id, _ in items(pool)}


def killed_ever_later(pool: LvmPool, executioner: Executioner, act: Callable[[LvmPool], object]) -> None:
    """Each attempt gets one command further, and finds what the one before has left."""
    before, states = seen(pool), []
    for step in itertools.count():

        def doomed(step: int = step) -> None:
            executioner.step = step  # in a fork: ours stays as it is
            act(pool)

        if not killed_by_itself(doomed):
            break
        states.append(items(pool))
        if step % 2:  # the other attempts find the leftovers untouched
            states.append(set(seen(pool).items()))
    act(pool)
    after = seen(pool)
    assert after != before
    assert set(before) in states
    assert all(state in [set(before), set(after), set(before.items()), set(after.items())] for state in states)


def test_sweep_finishes_and_undoes(pool: LvmPool, pool_group: ThinPool) -> None:
    group = pool_group.group
    tags = ("--addtag", "stratus", "--addtag", f"stratus-pool-{pool.pool_id}", "--setactivationskip", "n")
    staged, late, heir = (f"stratus-{letter}-{id}" for letter, id in (("t", NEW), ("r", VOLUME), ("r", SNAPSHOT)))
    for name in (staged, late, heir):
        lvm("lvcreate", "--snapshot", f"{group}/stratus-s-{SNAPSHOT}", "--name", name, *tags)
    assert {id for kind, id, _ in items(pool) if kind == "volume"} == {VOLUME, SNAPSHOT}
    lock = FileLock(HOST_LOCKS / f"{group.replace('-', '--')}-{pool_group.name}.{NEW.int % 64:02}")
    with lock:
        assert staged not in pool.sweep()
        assert staged in names(pool_group)
    assert pool.sweep() == [staged]
    assert names(pool_group) == {f"stratus-v-{VOLUME}", f"stratus-v-{SNAPSHOT}", f"stratus-s-{SNAPSHOT}"}
    assert read(pool, VOLUME)[:6] == b"later!"


def test_a_name_lost_in_a_revert_is_found_by_whoever_comes_first(pool: LvmPool, pool_group: ThinPool) -> None:
    old, new = (f"stratus-{letter}-{VOLUME}" for letter in "vr")
    acts: tuple[Callable[[], object], ...] = (
        lambda: pool.backing(VOLUME),
        lambda: pool.create(VOLUME, 2 * EXTENT),
        lambda: pool.resize(VOLUME, 2 * EXTENT),
        lambda: pool.snapshot(VOLUME, NEW),
        lambda: pool.activate(),
    )
    for act in acts:
        lvm("lvrename", pool_group.group, old, new)
        act()
        found = names(pool_group)
        assert old in found
        assert new not in found
    assert read(pool, VOLUME)[:6] == b"later!"


def test_killed_in_the_middle_of_commands(pool: LvmPool, pool_group: ThinPool) -> None:
    """lvm(8) is told to end, and ends where nothing is half done; what it does is waited for by the next."""
    chance = random.Random(20261123)

    def life() -> None:
        pool.revert(VOLUME, SNAPSHOT)
        pool.clone_volume(VOLUME, NEW, 3 * EXTENT)
        pool.delete_volume(NEW)

    for _ in range(4):
        killed_after(chance.uniform(0.02, 1.6), life)
        assert read(pool, VOLUME)[:6] in (b"before", b"later!")
        assert {id for _, id, _ in items(pool)} >= {VOLUME, SNAPSHOT}
        assert suspended() == []
    life()
    assert read(pool, VOLUME)[:6] == b"before"
    assert names(pool_group) == {f"stratus-v-{VOLUME}", f"stratus-s-{SNAPSHOT}"}


def test_a_volume_that_is_open_is_not_taken_away(pool: LvmPool, pool_group: ThinPool) -> None:
    with pool.backing(VOLUME).path.open("rb") as file:
        with pytest.raises(OSError, match="busy"):
            pool.revert(VOLUME, SNAPSHOT)
        assert file.read(6) == b"later!"
    assert names(pool_group) == {f"stratus-v-{VOLUME}", f"stratus-s-{SNAPSHOT}"}
    assert read(pool, VOLUME)[:6] == b"later!"
