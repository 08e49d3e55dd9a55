"""Loop devices of the real kernel."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import loop
from tests.support.filesystems import mounted
from tests.support.initiator import wait_until

MIB = 1 << 20
BLKROGET = 0x125E  # linux/fs.h


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """On a file system that knows direct I/O."""
    with mounted("xfs", 300 * MIB, tmp_path) as point:
        path = point / "file"
        path.touch()
        os.truncate(path, MIB)
        yield path


def _size(device: Path) -> int:
    with device.open("rb") as opened:
        return os.lseek(opened.fileno(), 0, os.SEEK_END)


def test_a_device_is_the_file_and_is_gone_after_the_block(file: Path) -> None:
    with loop.attached(file) as device:
        status = loop.status(device)
        assert status == (file.stat().st_dev, file.stat().st_ino, 0, False, True)
        with device.open("r+b") as opened:
            opened.write(b"\7" * 4096)
            os.fsync(opened.fileno())
        assert file.read_bytes()[:4096] == b"\7" * 4096
    wait_until(lambda: _is_not_of(device, file))


def _is_not_of(device: Path, file: Path) -> bool:
    status = loop.status(device)
    return status is None or status.inode != file.stat().st_ino


def test_it_lives_as_long_as_somebody_else_has_it_open(file: Path) -> None:
    with loop.attached(file) as device:
        holder = device.open("rb")
    assert not _is_not_of(device, file)
    holder.close()
    wait_until(lambda: _is_not_of(device, file))


def test_read_only(file: Path) -> None:
    with loop.attached(file, read_only=True) as device:
        status = loop.status(device)
        assert status
        assert status.read_only
        with device.open("rb") as opened:
            assert opened.read(4096) == bytes(4096)
            assert fcntl.ioctl(opened, BLKROGET, bytes(4)) != bytes(4)


def test_grow(file: Path) -> None:
    with loop.attached(file) as device:
        os.truncate(file, 3 * MIB)
        assert _size(device) == MIB
        loop.grow(device)
        assert _size(device) == 3 * MIB


def test_a_file_system_without_direct_io_is_served_too(tmp_path: Path) -> None:
    with mounted("tmpfs", 8 * MIB, tmp_path) as point:
        file = point / "file"
        file.write_bytes(b"\5" * MIB)
        with loop.attached(file) as device:
            assert _size(device) == MIB
            assert device.read_bytes() == b"\5" * MIB


def test_many_at_once_are_different_devices(file: Path) -> None:
    with loop.attached(file) as first, loop.attached(file) as second:
        assert first != second


def test_what_cannot_be_attached(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), loop.attached(tmp_path / "absent"):
        pass
    with pytest.raises(OSError, match=r"Is a directory|Invalid argument"), loop.attached(tmp_path):
        pass
