"""Directories to make something in, which a dead process cannot keep.

    <staging>/<key>.<n>/     0700
      lock                   flock(2) is held on it by who makes it

The lock ends with its process, however that dies: one that can be taken is of a leftover. Whoever makes a stage and
finds its lock taken met a sweep that took the new directory for one, and makes another. A lock without a name is
nobody's: who takes it looks whether it has one still. Nobody waits here.
A file is locked, not the directory: network file systems turn flock(2) into a lock that needs a file open for writing.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from blockdev.files import fsync_dir
from blockdev.locks import try_flock

_LOCK = "lock"
_NAME = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\.[0-9a-f]{8}")


@dataclass(frozen=True)
class Stage:
    """A directory of its maker's own."""

    key: UUID
    path: Path


@contextmanager
def made(staging: Path, key: UUID) -> Iterator[Stage]:
    """A new stage in `staging`; with all that is in it, it is gone when the block ends. Raises OSError."""
    path, lock = _new(staging, key)
    try:
        yield Stage(key, path)
    finally:
        try:
            _remove(path)
        finally:
            os.close(lock)


def remove_leftovers(staging: Path, key: UUID | None = None) -> list[str]:
    """Remove what dead processes left there (for `key`), and nothing that is being made; return the names."""
    names = [n for n in os.listdir(staging) if _NAME.fullmatch(n) and (key is None or n.startswith(str(key)))]
    removed = sorted(name for name in names if _remove_if_abandoned(staging / name))
    if removed:
        fsync_dir(staging)
    return removed


def _new(staging: Path, key: UUID) -> tuple[Path, int]:
    while True:
        path = staging / f"{key}.{secrets.token_hex(4)}"
        path.mkdir(mode=0o700)
        try:
            lock = _open_lock(path)
        except FileNotFoundError:  # a sweep has removed it
            continue
        if try_flock(lock) and os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)


def _open_lock(stage: Path) -> int:
    return os.open(stage / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _remove_if_abandoned(stage: Path) -> bool:
    try:
        lock = _open_lock(stage)
    except (FileNotFoundError, NotADirectoryError):  # finished or swept since, or no stage of ours
        return False
    try:
        if not (try_flock(lock) and os.fstat(lock).st_nlink):
            return False
        _remove(stage)
        return True
    finally:
        os.close(lock)


def _remove(stage: Path) -> None:
    """The lock last: while it has a name, who finds the stage can see that it is held. Whoever makes another in that
    moment has the directory: its maker, who has met a sweep, or a sweep, which will remove it."""
    with os.scandir(stage) as entries:
        others = [entry for entry in entries if entry.name != _LOCK]
    for entry in others:
        shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    with suppress(FileNotFoundError):
        os.unlink(stage / _LOCK)
    try:
        os.rmdir(stage)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise
