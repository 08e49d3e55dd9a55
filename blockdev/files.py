"""Files whose names and bytes survive a power cut once the call returns.

An fsync that fails must not be repeated: the kernel has marked the pages clean, and a second fsync would answer
success for data that is lost (fsync(2), EIO). So these functions raise OSError and the caller starts over.
"""

from __future__ import annotations

import os
from pathlib import Path


def fsync_file(path: Path) -> None:
    """Make the bytes and the size of the file `path` durable; not its name, which is its directory's."""
    _fsync(path, os.O_RDONLY | os.O_NOFOLLOW)


def fsync_dir(path: Path) -> None:
    """Make the names in the directory `path` durable."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def durable_rename(source: Path, target: Path, *, replace: bool = True) -> None:
    """Give the file `source` the name `target`: its bytes first, then the name, then both directories.

    With `replace`, an older `target` is replaced atomically. Without, it is kept and FileExistsError raised; rename(2)
    cannot refuse everywhere, link(2) does. A crash in between then leaves both names, of one file.
    """
    fsync_file(source)
    if replace:
        os.rename(source, target)
    else:
        os.link(source, target, follow_symlinks=False)
        os.unlink(source)
    fsync_dir(target.parent)
    if source.parent != target.parent:
        fsync_dir(source.parent)


def durable_unlink(path: Path) -> None:
    """Remove the name `path`. A missing one is success, and synced too: who removed it may have died before that."""
    path.unlink(missing_ok=True)
    fsync_dir(path.parent)


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
