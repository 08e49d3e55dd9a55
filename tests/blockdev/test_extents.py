from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.extents import (
    CHUNK,
    EXTENT_LAST,
    EXTENT_SHARED,
    EXTENT_UNWRITTEN,
    copy_sparse,
    data_ranges,
    fiemap,
    reflink,
    supports_reflink,
)
from blockdev.fallocate import Zeroing, fallocate, leaves_old_data
from tests.support.filesystems import mounted

MIB = 1 << 20


@pytest.fixture(scope="session")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("xfs", 300 * MIB, tmp_path_factory.mktemp("image")) as point:
        yield point


@pytest.fixture(params=["plain", "shm", "xfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    parent = {"plain": tmp_path, "shm": Path("/dev/shm")}.get(request.param) or request.getfixturevalue("xfs")
    with tempfile.TemporaryDirectory(dir=parent) as path:
        yield Path(path)


@pytest.fixture
def file(xfs: Path) -> Iterator[int]:
    with tempfile.TemporaryFile(dir=xfs) as file:
        yield file.fileno()


def nothing(done: int, total: int) -> None:
    pass


def open_sparse(path: Path) -> int:
    """24 MiB and a byte: 9 MiB of data after a hole of 1 MiB, 64 KiB of data at 16 MiB, and a hole at the end."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 24 * MIB + 1)
    os.pwrite(fd, os.urandom(9 * MIB), MIB)
    os.pwrite(fd, os.urandom(65536), 16 * MIB)
    return fd


RANGES = [(MIB, 9 * MIB), (16 * MIB, 65536)]


def test_data_ranges_skip_the_holes(directory: Path) -> None:
    fd = open_sparse(directory / "source")
    assert list(data_ranges(fd)) == RANGES
    os.ftruncate(fd, 0)
    assert list(data_ranges(fd)) == []
    os.close(fd)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_copy_keeps_bytes_and_holes(directory: Path, tmp_path: Path, elsewhere: bool) -> None:
    source = open_sparse(directory / "source")
    target = os.open((tmp_path if elsewhere else directory) / "target", os.O_RDWR | os.O_CREAT)
    seen: list[tuple[int, int]] = []
    copy_sparse(source, target, lambda done, total: seen.append((done, total)))
    total = 9 * MIB + 65536
    assert seen == [(CHUNK, total), (9 * MIB, total), (total, total)]
    assert os.pread(target, 25 * MIB, 0) == os.pread(source, 25 * MIB, 0)
    assert list(data_ranges(target)) == RANGES
    os.close(source)
    os.close(target)


def test_copy_of_a_file_without_copy_file_range(tmp_path: Path) -> None:
    """Two descriptors that copy_file_range refuses (EINVAL: a memfd is no file of the other's file system)."""
    source = os.memfd_create("source")
    os.write(source, b"x" * 100_000)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    copy_sparse(source, target, nothing)
    assert (tmp_path / "target").read_bytes() == b"x" * 100_000
    os.close(source)
    os.close(target)


def test_copy_of_a_file_that_is_cut_meanwhile_fails(directory: Path) -> None:
    source = open_sparse(directory / "source")
    target = os.open(directory / "target", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="became shorter"):
        copy_sparse(source, target, lambda done, total: os.ftruncate(source, CHUNK))
    os.close(source)
    os.close(target)


def test_copy_reports_other_errors(tmp_path: Path) -> None:
    source = open_sparse(tmp_path / "source")
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    read_only = os.open(tmp_path / "target", os.O_RDONLY)
    write_only = os.open(tmp_path / "source", os.O_WRONLY)
    for pair in ((source, read_only), (write_only, target)):
        with pytest.raises(OSError, match=r"Invalid argument|Bad file descriptor"):
            copy_sparse(*pair, nothing)
    for fd in (source, target, read_only, write_only):
        os.close(fd)


def test_reflink_where_it_works_and_where_not(xfs: Path, tmp_path: Path) -> None:
    assert supports_reflink(xfs)
    assert not supports_reflink(Path("/dev/shm"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        supports_reflink(xfs / "missing")


def test_fiemap_tells_data_holes_unwritten_and_shared(file: int, xfs: Path) -> None:
    os.ftruncate(file, 4 * MIB)
    os.pwrite(file, b"x" * MIB, MIB)
    fallocate(file, 1, 2 * MIB, MIB)  # allocated and never written
    written, unwritten = fiemap(file)
    assert (written.logical, written.length, written.flags) == (MIB, MIB, 0)
    assert written.physical > 0
    assert (unwritten.logical, unwritten.length) == (2 * MIB, MIB)
    assert unwritten.flags == EXTENT_UNWRITTEN | EXTENT_LAST
    with tempfile.TemporaryFile(dir=xfs) as clone:
        reflink(file, clone.fileno())
        (shared,) = (extent for extent in fiemap(clone.fileno()) if not extent.flags & EXTENT_UNWRITTEN)
        assert (shared.logical, shared.physical, shared.length) == (MIB, written.physical, MIB)
        assert shared.flags & EXTENT_SHARED


def test_fiemap_of_many_extents_and_of_none(file: int) -> None:
    assert list(fiemap(file)) == []
    os.ftruncate(file, 100 * 8192)  # or XFS allocates ahead of the end, into the holes
    for block in range(100):
        os.pwrite(file, b"x" * 4096, block * 8192)
    extents = list(fiemap(file))
    assert [(extent.logical, extent.length) for extent in extents] == [(block * 8192, 4096) for block in range(100)]
    assert [bool(extent.flags & EXTENT_LAST) for extent in extents] == [False] * 99 + [True]


def test_fiemap_without_sync_may_not_know_the_place(file: int) -> None:
    os.pwrite(file, b"x" * MIB, 0)
    (before,) = fiemap(file, sync=False)
    (after,) = fiemap(file, sync=True)
    assert before.physical == 0
    assert after.physical > 0


def test_fiemap_says_when_there_is_none() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file, pytest.raises(OSError, match="not supported"):
        list(fiemap(file.fileno()))


@pytest.mark.parametrize("mode", Zeroing)
def test_zeroing_is_found_honest(directory: Path, mode: Zeroing) -> None:
    assert not leaves_old_data(directory, mode)
    assert list(directory.iterdir()) == []


def test_punched_bytes_read_as_zeros(file: int) -> None:
    os.pwrite(file, b"x" * 65536, 0)
    fallocate(file, Zeroing.PUNCH_HOLE, 4096, 4096)
    assert os.pread(file, 12288, 0) == b"x" * 4096 + bytes(4096) + b"x" * 4096
    with pytest.raises(OSError, match="Invalid argument"):
        fallocate(file, Zeroing.PUNCH_HOLE, 0, -1)
