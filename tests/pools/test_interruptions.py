"""Work that is cancelled, killed or cut off leaves all of it or nothing to be seen."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from blockdev.extents import CHUNK
from pools.directory import DirectoryPool
from tests.pools.support import MIB, names, read, stopped_at, write
from tests.support.filesystems import after_power_cut

STEPS = ["staged", "filled", "published"]


@pytest.mark.parametrize("step", STEPS)
def test_create_killed_at_each_step(copying_pool: DirectoryPool, step: str) -> None:
    pool, volume_id = copying_pool, uuid4()
    with stopped_at(step, pool.path, "create", volume_id, MIB):
        assert pool.sweep() == []
    finished = {f"volumes/{volume_id}.raw"} if step == "published" else set()
    assert {name for name in names(pool) if not name.startswith("staging/")} == finished
    assert len(pool.sweep()) == (0 if step == "published" else 1)
    assert names(pool) == finished
    pool.create(volume_id, MIB)
    assert read(pool, volume_id) == bytes(MIB)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["copying", "xfs"])
def test_revert_killed_at_each_step(request: pytest.FixtureRequest, kind: str, step: str, tmp_path: Path) -> None:
    if kind == "xfs":
        path = request.getfixturevalue("xfs") / f"revert-{step}"
        path.mkdir()
        pool = DirectoryPool("default", path)
        pool.activate()
    else:
        pool = request.getfixturevalue("copying_pool")
    volume_id, snapshot = uuid4(), uuid4()
    pool.create(volume_id, MIB)
    write(pool, volume_id, b"a" * MIB)
    pool.snapshot(volume_id, snapshot)
    write(pool, volume_id, b"b" * MIB)
    with stopped_at(step, pool.path, "revert", volume_id, snapshot):
        pass
    assert read(pool, volume_id) == (b"a" if step == "published" else b"b") * MIB
    pool.revert(volume_id, snapshot)
    assert read(pool, volume_id) == b"a" * MIB
    assert names(pool) == {f"volumes/{volume_id}.raw", f"snapshots/{snapshot}.raw"}


def test_a_new_attempt_and_a_delete_clear_what_the_last_one_left(copying_pool: DirectoryPool) -> None:
    pool, volume_id, other = copying_pool, uuid4(), uuid4()
    for id in (volume_id, other):
        with stopped_at("filled", pool.path, "create", id, MIB):
            pass
    pool.create(volume_id, MIB)
    pool.delete_volume(other)
    assert names(pool) == {f"volumes/{volume_id}.raw"}


def test_a_kill_between_the_two_names_of_a_file_harms_neither(copying_pool: DirectoryPool) -> None:
    pool, volume_id = copying_pool, uuid4()
    pool.create(volume_id, MIB)
    write(pool, volume_id, b"data")
    staged = pool.path / "staging" / f"{volume_id}.00000000.raw"
    os.link(pool.backing(volume_id).path, staged)
    pool.create(volume_id, MIB)
    assert pool.sweep() == [staged.name]
    assert read(pool, volume_id)[:4] == b"data"


def test_a_late_rival_cannot_replace_a_volume(copying_pool: DirectoryPool) -> None:
    """A worker thought dead wakes up after its successor has done the work and the volume holds data."""
    pool, volume_id = copying_pool, uuid4()

    def successor(step: str) -> None:
        if step == "filled":
            pool.create(volume_id, MIB)
            write(pool, volume_id, b"data")

    with pytest.raises(FileExistsError):
        DirectoryPool("default", pool.path, pool_id=pool.pool_id, trace=successor).create(volume_id, MIB)
    assert read(pool, volume_id)[:4] == b"data"
    assert names(pool) == {f"volumes/{volume_id}.raw"}


def test_sweep_takes_only_leftovers_of_ours(copying_pool: DirectoryPool) -> None:
    pool = copying_pool
    staging = pool.path / "staging"
    leftovers = sorted(f"{uuid4()}.0123abcd.raw" for _ in range(3))
    for name in [*leftovers, "notes.txt", f"{uuid4()}.raw", f"{uuid4()}.0123abcd.raw.bak"]:
        (staging / name).write_bytes(b"x")
    assert pool.sweep() == leftovers
    assert pool.sweep() == []
    assert len(list(staging.iterdir())) == 3


def test_sweep_spares_a_process_that_only_sleeps(copying_pool: DirectoryPool) -> None:
    pool, volume_id = copying_pool, uuid4()
    with stopped_at("filled", pool.path, "create", volume_id, MIB) as process:
        process.send_signal(signal.SIGSTOP)
        assert pool.sweep() == []
        assert len(names(pool)) == 1
    assert len(pool.sweep()) == 1


def test_a_copy_reports_progress_and_can_be_cancelled(copying_pool: DirectoryPool) -> None:
    pool, volume_id, snapshot = copying_pool, uuid4(), uuid4()
    pool.create(volume_id, 64 * MIB)
    write(pool, volume_id, b"x" * (3 * CHUNK))

    class Cancelled(Exception):
        pass

    def cancel_at_the_second(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            raise Cancelled

    for copy in (
        lambda: pool.clone_volume(volume_id, uuid4(), 64 * MIB, cancel_at_the_second),
        lambda: pool.snapshot(volume_id, snapshot, cancel_at_the_second),
    ):
        seen: list[tuple[int, int]] = []
        with pytest.raises(Cancelled):
            copy()
        assert seen == [(CHUNK, 3 * CHUNK), (2 * CHUNK, 3 * CHUNK)]
        assert names(pool) == {f"volumes/{volume_id}.raw"}
    seen = [(0, 0), (0, 0)]
    pool.snapshot(volume_id, snapshot, cancel_at_the_second)
    assert seen[2:] == [(CHUNK, 3 * CHUNK), (2 * CHUNK, 3 * CHUNK), (3 * CHUNK, 3 * CHUNK)]


A, B, C = uuid4(), uuid4(), uuid4()


def _create_again(pool: DirectoryPool) -> None:
    """After an attempt that died between its last rename and its last sync."""
    with (pool.path / "volumes" / f"{C}.raw").open("xb") as file:
        file.truncate(MIB)
    pool.create(C, MIB)


LAST_CALLS: dict[str, tuple[Callable[[DirectoryPool], None], dict[str, bytes]]] = {
    "create": (lambda pool: pool.create(C, MIB), {f"volumes/{C}.raw": bytes(MIB)}),
    "clone_volume": (lambda pool: pool.clone_volume(A, C, 2 * MIB), {f"volumes/{C}.raw": b"a" * MIB + bytes(MIB)}),
    "clone_snapshot": (lambda pool: pool.clone_snapshot(B, C, MIB), {f"volumes/{C}.raw": b"b" * MIB}),
    "snapshot": (lambda pool: pool.snapshot(A, C), {f"snapshots/{C}.raw": b"a" * MIB}),
    "revert": (lambda pool: pool.revert(A, B), {f"volumes/{A}.raw": b"b" * MIB}),
    "resize": (lambda pool: pool.resize(A, 2 * MIB), {f"volumes/{A}.raw": b"a" * MIB + bytes(MIB)}),
    "delete_volume": (lambda pool: pool.delete_volume(A), {}),
    "delete_snapshot": (lambda pool: pool.delete_snapshot(B), {}),
    "create again": (_create_again, {f"volumes/{C}.raw": bytes(MIB)}),
}


@pytest.mark.parametrize("last_call", LAST_CALLS)
def test_a_call_that_returned_survives_a_power_cut(xfs: Path, tmp_path: Path, last_call: str) -> None:
    pool = DirectoryPool("default", xfs / f"power-{last_call}")
    pool.path.mkdir()
    pool.activate()
    pool.create(A, MIB)
    write(pool, A, b"b" * MIB)
    pool.snapshot(A, B)
    write(pool, A, b"a" * MIB)
    os.sync()
    call, expected = LAST_CALLS[last_call]
    call(pool)
    with after_power_cut(xfs, tmp_path) as survived:
        found = DirectoryPool("default", survived / pool.path.name, pool_id=pool.pool_id)
        found.activate()
        assert names(found) == names(pool)
        assert {name: (found.path / name).read_bytes() for name in expected} == expected


def test_a_new_pool_survives_a_power_cut(xfs: Path, tmp_path: Path) -> None:
    pool = DirectoryPool("default", xfs / "power")
    pool.path.mkdir()
    os.sync()
    pool.activate()
    with after_power_cut(xfs, tmp_path) as survived:
        DirectoryPool("default", survived / "power", pool_id=pool.pool_id).activate()
