"""The SHA-256 of a file, read once."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from blockdev.extents import Progress

CHUNK = 1 << 20
"""Bytes hashed between two looks at what `progress` says."""


def file_digest(path: Path, progress: Progress) -> str:
    """Read from the medium, not from what the page cache remembers of it, and leave nothing behind there. What
    `progress(done, total)` raises ends it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return _digest(fd, progress, forget=True)
    finally:
        os.close(fd)


def synced_digest(path: Path, progress: Progress) -> str:
    """Read while the kernel writes the same pages out: both are done on return, in the time of the longer. Raises
    OSError, also that of the sync."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    errors: list[OSError] = []

    def sync() -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            errors.append(error)

    syncing = threading.Thread(target=sync)
    syncing.start()
    try:
        digest = _digest(fd, progress)
    finally:
        syncing.join()
        os.close(fd)
    if errors:
        raise errors[0]
    return digest


def _digest(fd: int, progress: Progress, *, forget: bool = False) -> str:
    hasher, buffer = hashlib.sha256(), bytearray(CHUNK)
    done, total = 0, os.fstat(fd).st_size
    while size := os.readv(fd, [buffer]):
        hasher.update(memoryview(buffer)[:size])
        if forget:
            os.posix_fadvise(fd, done, size, os.POSIX_FADV_DONTNEED)
        done += size
        progress(done, total)
    return hasher.hexdigest()
