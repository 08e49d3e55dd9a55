"""Which bytes of a file are really there, and copies that share or skip the rest."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 8 << 20
"""Bytes copied between two calls of `progress`, and so the longest wait for a cancel."""

# linux/fs.h and linux/fiemap.h
_FICLONE = 0x40049409
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP = struct.Struct("=QQLLLL")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xL12x")
_FIEMAP_FLAG_SYNC = 0x1
# 32 + 17 * 56 = 984 bytes: fcntl.ioctl lets other threads run only with a buffer of up to 1 KiB.
_EXTENTS_PER_CALL = 17

EXTENT_LAST = 0x1
EXTENT_UNKNOWN = 0x2
EXTENT_DELALLOC = 0x4
EXTENT_ENCODED = 0x8
EXTENT_NOT_ALIGNED = 0x100
EXTENT_INLINE = 0x200
EXTENT_UNWRITTEN = 0x800
EXTENT_SHARED = 0x2000

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL, errno.EXDEV}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Extent:
    """A run of bytes: at `logical` in the file, at `physical` on the file system's device. `flags` are EXTENT_*."""

    logical: int
    physical: int
    length: int
    flags: int


def reflink(source_fd: int, target_fd: int) -> None:
    """Make the target's content the source's by sharing its extents: ioctl_ficlone(2).

    Atomic against writers of the source on XFS and btrfs. Not durable on return: fsync the target and its directory.
    Raises OSError (EOPNOTSUPP, EXDEV, EINVAL, ENOTTY where it cannot be done).
    """
    fcntl.ioctl(target_fd, _FICLONE, source_fd)


def supports_reflink(directory: Path) -> bool:
    """Whether files in `directory` can be reflinked, found out by doing it. Raises OSError for other failures."""
    content = b"reflink" * 1024
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as target:
        os.pwrite(source.fileno(), content, 0)
        try:
            reflink(source.fileno(), target.fileno())
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return os.pread(target.fileno(), len(content), 0) == content


def fiemap(fd: int, *, sync: bool = True) -> Iterator[Extent]:
    """The extents of a file in order; holes are what lies between them. Kernel: Documentation/filesystems/fiemap.rst.

    `sync` writes dirty pages out first (FLAG_SYNC); without it some extents may be EXTENT_DELALLOC and have no
    place yet. Raises OSError (EOPNOTSUPP: a file system without FIEMAP, such as tmpfs).
    """
    start, flags = 0, _FIEMAP_FLAG_SYNC if sync else 0
    while True:
        batch = _fiemap_from(fd, start, flags)
        yield from batch
        if not batch or batch[-1].flags & EXTENT_LAST:
            return
        start, flags = batch[-1].logical + batch[-1].length, 0


def _fiemap_from(fd: int, start: int, flags: int) -> list[Extent]:
    buffer = bytearray(_FIEMAP.size + _EXTENTS_PER_CALL * _FIEMAP_EXTENT.size)
    _FIEMAP.pack_into(buffer, 0, start, (1 << 64) - 1 - start, flags, 0, _EXTENTS_PER_CALL, 0)
    fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
    count = _FIEMAP.unpack_from(buffer)[3]
    end = _FIEMAP.size + count * _FIEMAP_EXTENT.size
    return [Extent(*fields) for fields in _FIEMAP_EXTENT.iter_unpack(memoryview(buffer)[_FIEMAP.size : end])]


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is not a hole: lseek(2), SEEK_DATA. A file system that knows no holes gives one range.

    Moves the descriptor's file offset.
    """
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end - start


def copy_sparse(source_fd: int, target_fd: int, progress: Progress) -> None:
    """Copy a file nobody writes to into an empty one: the same size, its holes still holes.

    `progress(done, total)` is called after each chunk of at most CHUNK bytes; both count only bytes that are no hole.
    What it raises ends the copy. Not durable on return. Raises OSError.
    """
    os.ftruncate(target_fd, os.fstat(source_fd).st_size)
    ranges = list(data_ranges(source_fd))
    done, total = 0, sum(length for _, length in ranges)
    for start, length in ranges:
        for offset in range(start, start + length, CHUNK):
            size = min(CHUNK, start + length - offset)
            _copy_chunk(source_fd, target_fd, offset, size)
            done += size
            progress(done, total)


def _copy_chunk(source_fd: int, target_fd: int, offset: int, size: int) -> None:
    end = offset + size
    while offset < end:
        # 0 before the end of the file is a "cannot" too: some file systems of some kernels say it that way.
        copied = _copy_in_kernel(source_fd, target_fd, offset, end - offset)
        offset += copied or _copy_by_hand(source_fd, target_fd, offset, end - offset)


def _copy_in_kernel(source_fd: int, target_fd: int, offset: int, size: int) -> int:
    try:
        return os.copy_file_range(source_fd, target_fd, size, offset, offset)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return 0
        raise


def _copy_by_hand(source_fd: int, target_fd: int, offset: int, size: int) -> int:
    content = os.pread(source_fd, size, offset)
    if not content:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return os.pwrite(target_fd, content, offset)
