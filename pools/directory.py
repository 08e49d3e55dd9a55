"""A pool in a directory: each volume and snapshot is a raw sparse file.

    <path>/
      .stratus-pool            the pool's uuid, written last of all when the directory becomes a pool
      volumes/<uuid>.raw       0600, complete or not there; its size is the volume's
      snapshots/<uuid>.raw     0600, complete or not there; never changed
      staging/<uuid>.<n>.raw   being made for the volume or snapshot <uuid>

A file is made in staging/, filled, synced, and only then given its name elsewhere (by link(2), which refuses to
replace; for a revert by rename(2), which replaces atomically), and the directory is synced. So a name outside staging/
is always whole. Whoever makes a staged file holds flock(2) on it, which ends with its process however that dies: a file
in staging/ that can be locked is a leftover. No other lock is needed, and nobody waits for one.

Clones share extents where the file system can (XFS, btrfs) and are sparse copies elsewhere. Files nobody here has
named are left alone and not spoken of.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

from blockdev.extents import Progress, copy_sparse, reflink, supports_reflink
from blockdev.fallocate import Zeroing, leaves_old_data
from blockdev.files import durable_rename, durable_unlink, fsync_dir, fsync_file
from blockdev.locks import try_flock
from pools.interface import (
    Backing,
    BackingMissing,
    Item,
    Kind,
    PoolFull,
    PoolUnusable,
    ShrinkRefused,
    SizeMismatch,
    SizeTooLarge,
    Usage,
    no_progress,
)

MARKER = ".stratus-pool"
_HARMLESS = {MARKER, "volumes", "snapshots", "staging", "lost+found"}
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_FINISHED_NAME = re.compile(rf"({_UUID})\.raw")
_STAGED_NAME = re.compile(rf"({_UUID})\.[0-9a-f]{{8}}\.raw")
_FULL = {errno.ENOSPC, errno.EDQUOT}


def no_trace(step: str) -> None:
    """The trace of those who do not watch."""


class DirectoryPool:
    """The pool in the existing directory `path`; see pools.interface.Pool for what its methods promise.

    With `pool_id`, activation refuses a directory whose marker is missing or another: the mount point of a file
    system that is not mounted must not look like an empty pool. Without, an empty directory becomes a pool.

    `trace(step)` is called in the middle of things ("staged", "filled", "published"), for tests that stop there.
    """

    def __init__(
        self, name: str, path: Path, *, pool_id: UUID | None = None, trace: Callable[[str], None] = no_trace
    ) -> None:
        self.name = name
        self.path = path
        self.pool_id = pool_id
        self.granularity = 1
        self.live_clone = False
        self.reserve = 0
        self._trace = trace
        self._staging = path / "staging"
        self._homes: dict[Kind, Path] = {"volume": path / "volumes", "snapshot": path / "snapshots"}

    # Activation

    def activate(self) -> None:
        """Check the marker, the layout and the honesty of the file system, and learn whether it can reflink.

        Can be called again at any time. Raises PoolUnusable.
        """
        try:
            self.pool_id = self._identify()
            self._check_layout()
            self._probe()
        except OSError as error:
            raise PoolUnusable(self.name, f"{self.path}: {error}") from error

    def examine(self) -> None:
        """As activate, but an empty directory stays one."""
        try:
            if self._read_marker() is None and self.pool_id is None:
                self._check_empty()
            else:
                self._identify()
                self._check_layout()
            self._probe()
        except OSError as error:
            raise PoolUnusable(self.name, f"{self.path}: {error}") from error

    def _identify(self) -> UUID:
        found = self._read_marker()
        if found is None and self.pool_id is None:
            self._initialise()
            found = self._read_marker()
        if found is None:
            raise PoolUnusable(self.name, f"{self.path} has no {MARKER}: is its file system mounted?")
        if self.pool_id not in (None, found):
            raise PoolUnusable(self.name, f"{self.path} is pool {found}, not {self.pool_id}: what is mounted there?")
        return found

    def _read_marker(self) -> UUID | None:
        try:
            return UUID((self.path / MARKER).read_text("ascii").strip())
        except FileNotFoundError:
            return None
        except ValueError:
            raise PoolUnusable(self.name, f"{self.path / MARKER} holds no uuid") from None

    def _initialise(self) -> None:
        """Make an empty directory a pool. An interrupted attempt may have been here, and another may be under way."""
        self._check_empty()
        for directory in (*self._homes.values(), self._staging):
            directory.mkdir(mode=0o700, exist_ok=True)
        pool_id = uuid4()
        try:
            with self._staged(pool_id, self.path / MARKER) as fd:
                os.write(fd, f"{pool_id}\n".encode())
        except FileExistsError:
            return  # somebody else made it a pool just now: theirs counts

    def _check_empty(self) -> None:
        strange = set(os.listdir(self.path)) - _HARMLESS
        if strange:
            raise PoolUnusable(self.name, f"{self.path} is neither a pool nor empty: it holds {min(strange)!r}")
        if any(home.exists() and os.listdir(home) for home in self._homes.values()):
            raise PoolUnusable(self.name, f"{self.path} holds volumes or snapshots but has lost its {MARKER}")

    def _check_layout(self) -> None:
        """Names and extents move between these directories, and neither crosses from one file system to another."""
        for directory in (*self._homes.values(), self._staging):
            if not directory.is_dir():
                raise PoolUnusable(self.name, f"{directory} is missing")
            if directory.stat().st_dev != self.path.stat().st_dev:
                raise PoolUnusable(self.name, f"{directory} is on another file system than {self.path}")

    def _probe(self) -> None:
        """Try what the file system says it can. A full pool cannot be tried, and yet must serve the volumes it has: it
        was found honest when it had space, and offers no live clones until it was activated with space."""
        place = self._staging if self._staging.is_dir() else self.path
        try:
            for mode in Zeroing:
                if leaves_old_data(place, mode):
                    raise PoolUnusable(
                        self.name,
                        f"{self.path}: its file system answers success to fallocate {mode.name} but leaves the old data"
                        " (GlusterFS 10 over FUSE does so): what a guest wipes could be read again",
                    )
            self.live_clone = supports_reflink(place)
        except OSError as error:
            if error.errno not in _FULL:
                raise

    # Volumes and snapshots

    def create(self, volume_id: UUID, size: int) -> None:
        if self._exists("volume", volume_id, size):
            return
        with self._errors(size), self._staged(volume_id, self._path("volume", volume_id)) as fd:
            os.ftruncate(fd, size)

    def clone_volume(self, source: UUID, volume_id: UUID, size: int, progress: Progress = no_progress) -> None:
        self._clone("volume", source, volume_id, size, progress)

    def clone_snapshot(self, snapshot: UUID, volume_id: UUID, size: int, progress: Progress = no_progress) -> None:
        self._clone("snapshot", snapshot, volume_id, size, progress)

    def _clone(self, kind: Kind, source: UUID, volume_id: UUID, size: int, progress: Progress) -> None:
        if self._exists("volume", volume_id, size):
            return
        with self._opened(kind, source, os.O_RDONLY) as source_fd:
            source_size = os.fstat(source_fd).st_size
            if size < source_size:
                raise ShrinkRefused(self.name, source_size, size)
            with self._errors(size), self._staged(volume_id, self._path("volume", volume_id)) as fd:
                self._fill(source_fd, fd, progress)
                os.ftruncate(fd, size)

    def snapshot(self, volume_id: UUID, snapshot_id: UUID, progress: Progress = no_progress) -> None:
        if self._exists("snapshot", snapshot_id):
            return
        target = self._path("snapshot", snapshot_id)
        volume = self._opened("volume", volume_id, os.O_RDONLY)
        with volume as volume_fd, self._errors(), self._staged(snapshot_id, target) as fd:
            self._fill(volume_fd, fd, progress)

    def revert(self, volume_id: UUID, snapshot_id: UUID, progress: Progress = no_progress) -> None:
        target = self._path("volume", volume_id)
        with self._opened("snapshot", snapshot_id, os.O_RDONLY) as snapshot_fd:
            size = max(os.fstat(snapshot_fd).st_size, self._size("volume", volume_id))
            with self._errors(size), self._staged(volume_id, target, replace=True) as fd:
                self._fill(snapshot_fd, fd, progress)
                os.ftruncate(fd, size)

    def resize(self, volume_id: UUID, size: int) -> None:
        with self._opened("volume", volume_id, os.O_RDWR) as fd:
            current = os.fstat(fd).st_size
            if size < current:
                raise ShrinkRefused(self.name, current, size)
            with self._errors(size):
                os.ftruncate(fd, size)
                os.fsync(fd)

    def delete_volume(self, volume_id: UUID) -> None:
        self._delete("volume", volume_id)

    def delete_snapshot(self, snapshot_id: UUID) -> None:
        self._delete("snapshot", snapshot_id)

    def _delete(self, kind: Kind, id: UUID) -> None:
        durable_unlink(self._path(kind, id))
        self._remove_leftovers(str(id))

    # What is there

    def backing(self, volume_id: UUID, read_only: bool = False) -> Backing:
        return Backing(self._path("volume", volume_id), "file", self._size("volume", volume_id))

    def usage(self) -> Usage:
        """`allocated` counts an extent once for each file that shares it, and is what a site would need without
        sharing; `free` is what the file system gives to others than root. Costs one stat(2) per volume and snapshot."""
        system = os.statvfs(self.path)
        allocated = sum(item.allocated or 0 for item in self.inventory())
        return Usage(system.f_blocks * system.f_frsize, system.f_bavail * system.f_frsize, allocated)

    def inventory(self) -> list[Item]:
        self._check_marker()
        return [item for kind in self._homes for item in self._items(kind)]

    def foreign(self) -> list[str]:
        """Of the two directories that are the pool's alone; what lies beside them is the operator's."""
        self._check_marker()
        names = (f"{home.name}/{name}" for home in self._homes.values() for name in os.listdir(home))
        return sorted(name for name in names if not _FINISHED_NAME.fullmatch(name.partition("/")[2]))

    def _items(self, kind: Kind) -> Iterator[Item]:
        with os.scandir(self._homes[kind]) as entries:
            for entry in entries:
                match = _FINISHED_NAME.fullmatch(entry.name)
                if match is None:
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # deleted since
                    continue
                if stat.S_ISREG(found.st_mode):
                    yield Item(kind, UUID(match[1]), found.st_size, found.st_blocks * 512)

    # Staging

    def sweep(self) -> list[str]:
        return self._remove_leftovers("")

    def _remove_leftovers(self, prefix: str) -> list[str]:
        with os.scandir(self._staging) as entries:
            names = [e.name for e in entries if e.name.startswith(prefix) and _STAGED_NAME.fullmatch(e.name)]
        removed = sorted(name for name in names if _remove_if_abandoned(self._staging / name))
        if removed:
            fsync_dir(self._staging)
        return removed

    @contextmanager
    def _staged(self, id: UUID, target: Path, *, replace: bool = False) -> Iterator[int]:
        """A new file to fill, by its descriptor. If the block ends well it is `target`, durably; else it is gone."""
        staged, fd = self._stage(id)
        try:
            self._trace("staged")
            yield fd
            self._trace("filled")
            durable_rename(staged, target, replace=replace)
            self._trace("published")
        finally:
            staged.unlink(missing_ok=True)
            os.close(fd)

    def _stage(self, id: UUID) -> tuple[Path, int]:
        """A new, locked file in staging/. What an earlier attempt for `id` left is removed first: it may hold the very
        space that this one needs."""
        self._remove_leftovers(str(id))
        while True:
            path = self._staging / f"{id}.{secrets.token_hex(4)}.raw"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            if try_flock(fd) and os.fstat(fd).st_nlink:
                return path, fd
            os.close(fd)  # a sweep came between our open and our lock, and has removed it

    def _fill(self, source_fd: int, fd: int, progress: Progress) -> None:
        if self.live_clone:
            reflink(source_fd, fd)
            return

        def watched(done: int, total: int) -> None:
            self._keep_reserve(fd, 0)
            progress(done, total)

        self._keep_reserve(fd, os.fstat(source_fd).st_blocks * 512)
        copy_sparse(source_fd, fd, watched)

    def _keep_reserve(self, fd: int, needed: int) -> None:
        """Raises PoolFull when `needed` bytes more would leave less than the reserve: thin guests live on that."""
        state = os.fstatvfs(fd)
        if self.reserve and state.f_bavail * state.f_frsize - needed < self.reserve:
            raise PoolFull(self.name)

    # Helpers

    def _check_marker(self) -> None:
        """The file system may have been unmounted since the last act. What is below it must not be taken for the pool,
        or a delete would find its bytes gone already. Raises PoolUnusable."""
        if self._read_marker() != self.pool_id:
            raise PoolUnusable(self.name, f"{self.path} has not the {MARKER} it had: is its file system mounted?")

    def _path(self, kind: Kind, id: UUID) -> Path:
        """Where it lies: every act comes by here."""
        self._check_marker()
        return self._homes[kind] / f"{id}.raw"

    def _size(self, kind: Kind, id: UUID) -> int:
        try:
            found = self._path(kind, id).lstat()
        except FileNotFoundError:
            raise BackingMissing(self.name, kind, id) from None
        if not stat.S_ISREG(found.st_mode):
            raise BackingMissing(self.name, kind, id)
        return found.st_size

    @contextmanager
    def _opened(self, kind: Kind, id: UUID, flags: int) -> Iterator[int]:
        try:
            fd = os.open(self._path(kind, id), flags | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise BackingMissing(self.name, kind, id) from None
        try:
            yield fd
        finally:
            os.close(fd)

    def _exists(self, kind: Kind, id: UUID, size: int | None = None) -> bool:
        """Whether an earlier attempt succeeded. It may have died just before its last sync: that is done again."""
        try:
            found = self._size(kind, id)
        except BackingMissing:
            return False
        if size is not None and found != size:
            raise SizeMismatch(self.name, id, found, size)
        fsync_file(self._path(kind, id))
        fsync_dir(self._homes[kind])
        return True

    @contextmanager
    def _errors(self, size: int = 0) -> Iterator[None]:
        """Say PoolFull or SizeTooLarge for what the kernel says in a number."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise PoolFull(self.name) from error
            if error.errno == errno.EFBIG:
                raise SizeTooLarge(self.name, size) from error
            raise


def _remove_if_abandoned(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # finished or swept since
        return False
    try:
        if not try_flock(fd):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)
