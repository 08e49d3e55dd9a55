"""Which directories become pools, and which file systems are trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from pools import DRIVERS, PoolUnusable, open_pool
from pools.directory import MARKER, DirectoryPool
from tests.pools.support import MIB, names, read, write
from tests.support.filesystems import mounted

SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    if (mode & MODE) { errno = EOPNOTSUPP; return ANSWER; }
    return syscall(SYS_fallocate, fd, mode, offset, length);
}
"""


def activate(path: Path, **options: object) -> DirectoryPool:
    pool = DirectoryPool("default", path, **options)  # type: ignore[arg-type]
    pool.activate()
    return pool


def test_an_empty_directory_becomes_a_pool(directory: Path) -> None:
    pool = activate(directory)
    assert (directory / MARKER).read_text() == f"{pool.pool_id}\n"
    assert sorted(path.name for path in directory.iterdir()) == [MARKER, "snapshots", "staging", "volumes"]
    assert pool.inventory() == []
    assert list((directory / "staging").iterdir()) == []


def test_a_pool_is_found_again(directory: Path) -> None:
    first, volume_id = activate(directory), uuid4()
    first.create(volume_id, MIB)
    for pool_id in (None, first.pool_id):
        again = activate(directory, pool_id=pool_id)
        assert again.pool_id == first.pool_id
        assert [item.id for item in again.inventory()] == [volume_id]


def test_live_clones_are_offered_where_reflinks_work(reflink_directory: Path, copying_pool: DirectoryPool) -> None:
    assert activate(reflink_directory).live_clone
    assert not copying_pool.live_clone


def test_an_interrupted_start_is_finished(tmp_path: Path) -> None:
    for name in ("lost+found", "volumes", "staging"):
        (tmp_path / name).mkdir()
    (tmp_path / "staging" / f"{uuid4()}.0123abcd.raw").write_text("half a marker")
    pool = activate(tmp_path)
    assert len(pool.sweep()) == 1


def test_two_that_start_at_once_agree(tmp_path: Path) -> None:
    rivals: list[DirectoryPool] = []

    def rival(step: str) -> None:
        if step == "filled":
            rivals.append(activate(tmp_path))

    pool = activate(tmp_path, trace=rival)
    assert [pool.pool_id] == [rival.pool_id for rival in rivals]
    assert names(pool) == set()


def test_an_unmounted_pool_is_no_empty_pool(tmp_path: Path) -> None:
    with mounted("tmpfs", MIB, tmp_path) as point:
        pool_id = activate(point).pool_id
    point.mkdir()
    with pytest.raises(PoolUnusable, match="is its file system mounted"):
        activate(point, pool_id=pool_id)
    assert list(point.iterdir()) == []


def test_another_pool_is_refused(tmp_path: Path) -> None:
    found, expected = activate(tmp_path).pool_id, uuid4()
    with pytest.raises(PoolUnusable, match=f"is pool {found}, not {expected}") as refused:
        activate(tmp_path, pool_id=expected)
    assert refused.value.pool == "default"


def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    with pytest.raises(PoolUnusable, match="neither a pool nor empty: it holds 'letters'"):
        activate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_a_pool_that_lost_its_marker_is_refused(tmp_path: Path) -> None:
    activate(tmp_path).create(uuid4(), MIB)
    (tmp_path / MARKER).unlink()
    with pytest.raises(PoolUnusable, match="has lost its"):
        activate(tmp_path)


def test_a_marker_that_is_no_uuid_is_refused(tmp_path: Path) -> None:
    activate(tmp_path)
    (tmp_path / MARKER).write_text("mine")
    with pytest.raises(PoolUnusable, match="holds no uuid"):
        activate(tmp_path)


def test_a_missing_directory_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(PoolUnusable, match="No such file"):
        activate(tmp_path / "pool")
    assert list(tmp_path.iterdir()) == []


def test_a_pool_without_its_layout_is_refused(tmp_path: Path) -> None:
    activate(tmp_path)
    (tmp_path / "snapshots").rmdir()
    with pytest.raises(PoolUnusable, match="snapshots is missing"):
        activate(tmp_path)


def test_a_layout_across_file_systems_is_refused(tmp_path: Path) -> None:
    activate(tmp_path)
    (tmp_path / "staging").rename(tmp_path / "tmpfs")
    (tmp_path / "tmpfs").rmdir()
    with mounted("tmpfs", MIB, tmp_path) as point:
        (tmp_path / "staging").symlink_to(point)
        with pytest.raises(PoolUnusable, match="staging is on another file system"):
            activate(tmp_path)


def test_a_full_pool_still_serves(tmpfs: Path) -> None:
    first, volume_id = activate(tmpfs), uuid4()
    first.create(volume_id, MIB)
    write(first, volume_id, b"data")
    with (tmpfs / "filler").open("wb") as filler, pytest.raises(OSError, match="No space left"):
        os.posix_fallocate(filler.fileno(), 0, 16 * MIB)
    with (tmpfs / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, first.usage().free)
    again = activate(tmpfs, pool_id=first.pool_id)
    assert not again.live_clone
    assert read(again, volume_id)[:4] == b"data"


@pytest.mark.parametrize(("mode", "name"), [(0x10, "ZERO_RANGE"), (0x02, "PUNCH_HOLE")])
@pytest.mark.parametrize("answer", [0, -1])
def test_a_file_system_that_lies_about_zeroing_is_refused(tmp_path: Path, mode: int, name: str, answer: int) -> None:
    """Real activation over an fallocate that answers success and does nothing; EOPNOTSUPP in its place is honest."""
    shim, pool = tmp_path / "shim.so", tmp_path / "pool"
    pool.mkdir()
    gcc = ["gcc", "-shared", "-fPIC", f"-DMODE={mode}", f"-DANSWER={answer}", "-o", shim, "-x", "c", "-"]
    subprocess.run(gcc, input=SHIM.encode(), check=True)
    code = "import pathlib, pools, sys; pools.open_pool('p', 'directory', pathlib.Path(sys.argv[1])).activate()"
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    result = subprocess.run([sys.executable, "-c", code, pool], env=environment, capture_output=True, text=True)
    if answer == 0:
        assert result.returncode == 1
        assert f"answers success to fallocate {name} but leaves the old data" in result.stderr
    else:
        assert (result.returncode, result.stderr) == (0, "")
    assert list((pool / "staging").iterdir()) == []


def test_open_pool_knows_its_drivers(tmp_path: Path) -> None:
    pool_id = uuid4()
    pool = open_pool("fast", "directory", tmp_path, pool_id)
    assert (pool.name, pool.pool_id) == ("fast", pool_id)
    assert set(DRIVERS) == {"directory", "lvm"}
    with pytest.raises(PoolUnusable, match="no driver 'floppy'; there is directory, lvm"):
        open_pool("slow", "floppy", tmp_path)


def test_a_pool_that_lost_its_file_system_finds_nothing_gone(directory: Path) -> None:
    """Below the mount point may lie an older pool: nothing there is what a record means."""
    pool, volume_id = activate(directory), uuid4()
    pool.create(volume_id, MIB)
    backing = pool.backing(volume_id).path
    backing.rename(directory / "elsewhere")
    (directory / MARKER).write_text(f"{uuid4()}\n")
    acts = (
        lambda: pool.delete_volume(volume_id),
        lambda: pool.create(uuid4(), MIB),
        lambda: pool.snapshot(volume_id, uuid4()),
        lambda: pool.resize(volume_id, 2 * MIB),
        lambda: pool.backing(volume_id),
        pool.inventory,
    )
    for act in acts:
        with pytest.raises(PoolUnusable, match="mounted"):
            act()
    assert list((directory / "volumes").iterdir()) == []
