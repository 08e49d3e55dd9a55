"""The cache: immutable qcow2 files, each named by the SHA-256 of its bytes, in a directory.

    <root>/                    0755: may be exported read-only, by NFS or otherwise
      .stratus-cache           the cache's uuid, written last of all when the directory becomes a cache
      images/<sha256>.qcow2    0444, complete and verified or not there
      index/                   0755, the place for what is known of an image's files (<sha256>.index)
      staging/<key>.<n>/       being made for <key>; 0700 like all that follows
        lock                   flock(2) is held on it by who makes it
      aside/<sha256>.qcow2     was an image until its bytes were found changed; goes with the image
      locks/<name>             what lock() locks; never unlinked

A file is made in a directory of its own in staging/, made ours and read-only, read once for its digest while it is
synced, and only then given its name in images/ by link(2), which refuses to replace: whoever commits the same bytes
later finds them there. So a name in images/ is always whole, and never changes what it means.

The lock in a directory of staging/ ends with its process, however that dies: one that can be taken is of a leftover
(see staging.py). What may be evicted is the caller's knowledge (pins, clones, overlays are rows): `evict` asks nobody.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from blockdev.extents import Progress
from blockdev.files import durable_rename, durable_unlink, fsync_dir
from blockdev.locks import FileLock
from imagecache import staging
from imagecache.digests import file_digest, synced_digest
from imagecache.errors import CacheFull, CacheUnusable, NotCached
from imagecache.staging import Stage

MARKER = ".stratus-cache"
_LAYOUT = {"images": 0o755, "index": 0o755, "staging": 0o700, "aside": 0o700, "locks": 0o700}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_IMAGE_NAME = re.compile(r"([0-9a-f]{64})\.qcow2")
_LOCK_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,199}")
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Item:
    """An image that is there: `file_size` is its length, `allocated` what it takes of the disk, in bytes."""

    digest: str
    file_size: int
    allocated: int


@dataclass(frozen=True)
class Usage:
    """Of the file system: its `size` and what it gives to others than root; of the cache: what its images take, and
    what is being made or was set aside. In bytes."""

    size: int
    free: int
    allocated: int
    others: int


def no_trace(step: str) -> None:
    """The trace of those who do not watch."""


def no_progress(done: int, total: int) -> None:
    """The progress of those who do not watch."""


class Cache:
    """The cache in the existing directory `root`.

    `reserve` is what must stay free of its file system, in bytes: others live there too. `trace(step)` is called in the
    middle of things, for tests that stop there. All methods but `activate` raise CacheUnusable when the directory is
    not, or no longer, the cache that was activated: the mount point of a file system that is not mounted must not look
    like an empty cache.
    """

    def __init__(self, root: Path, trace: Callable[[str], None] = no_trace, *, reserve: int = 0) -> None:
        self.root = root
        self.trace = trace
        self.reserve = reserve
        self.cache_id: UUID | None = None

    # ------------------------------------------------------------ activation

    def activate(self, cache_id: UUID | None = None) -> UUID:
        """Check the marker and the layout, and return the cache's id. With `cache_id` another, or none, is refused;
        without, an empty directory becomes a cache. Can be called again at any time. Raises CacheUnusable."""
        try:
            found = self._read_marker()
            if found is None and cache_id is None:
                found = self._initialise()
            if found is None:
                raise CacheUnusable(f"{self.root} has no {MARKER}: is its file system mounted?")
            if cache_id not in (None, found):
                raise CacheUnusable(f"{self.root} is cache {found}, not {cache_id}: what is mounted there?")
            self._check_layout()
        except OSError as error:
            raise CacheUnusable(f"{self.root}: {error}") from error
        self.cache_id = found
        return found

    def _read_marker(self) -> UUID | None:
        try:
            return UUID((self.root / MARKER).read_text("ascii").strip())
        except FileNotFoundError:
            return None
        except ValueError:
            raise CacheUnusable(f"{self.root / MARKER} holds no uuid") from None

    def _initialise(self) -> UUID | None:
        """Make an empty directory a cache. An interrupted attempt may have been here, and another may be under way."""
        self._check_empty()
        for name, mode in _LAYOUT.items():
            (self.root / name).mkdir(exist_ok=True)
            (self.root / name).chmod(mode)
        fsync_dir(self.root)
        with staging.made(self._staging, uuid4()) as stage:
            marker = stage.path / MARKER
            marker.write_text(f"{uuid4()}\n")
            marker.chmod(0o444)
            with suppress(FileExistsError):  # somebody else made it a cache just now: theirs counts
                durable_rename(marker, self.root / MARKER, replace=False)
        return self._read_marker()

    def _check_empty(self) -> None:
        strange = set(os.listdir(self.root)) - {*_LAYOUT, MARKER, "lost+found"}
        if strange:
            raise CacheUnusable(f"{self.root} is neither a cache nor empty: it holds {min(strange)!r}")
        if self._images.exists() and os.listdir(self._images):
            raise CacheUnusable(f"{self.root} holds images but has lost its {MARKER}")

    def _check_layout(self) -> None:
        """Names move between these directories, and none crosses from one file system to another."""
        for name, mode in _LAYOUT.items():
            directory = self.root / name
            found = directory.lstat() if os.path.lexists(directory) else None
            if found is None or not stat.S_ISDIR(found.st_mode):
                raise CacheUnusable(f"{directory} is missing, or no directory")
            if found.st_dev != self.root.stat().st_dev:
                raise CacheUnusable(f"{directory} is on another file system than {self.root}")
            if stat.S_IMODE(found.st_mode) != mode:
                directory.chmod(mode)

    def _check_marker(self) -> None:
        if self.cache_id is None or self._read_marker() != self.cache_id:
            raise CacheUnusable(f"{self.root} has not the {MARKER} it had: is its file system mounted?")

    # ------------------------------------------------------------ what is there

    def path(self, digest: str) -> Path:
        """Where the image lies: a file that never changes. Raises NotCached."""
        path = self._home(digest)
        try:
            regular = stat.S_ISREG(path.lstat().st_mode)
        except FileNotFoundError:
            regular = False
        if not regular:
            raise NotCached(f"there is no image {digest} in the cache")
        return path

    def item(self, digest: str) -> Item:
        """Raises NotCached."""
        found = self.path(digest).lstat()
        return Item(digest, found.st_size, found.st_blocks * 512)

    def inventory(self) -> list[Item]:
        """The images, in no order. Files of other names are the operator's, and not spoken of."""
        self._check_marker()
        return list(self._items())

    def _items(self) -> Iterator[Item]:
        with os.scandir(self._images) as entries:
            for entry in entries:
                match = _IMAGE_NAME.fullmatch(entry.name)
                if match is None:
                    continue
                with suppress(FileNotFoundError):  # evicted since
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        yield Item(match[1], found.st_size, found.st_blocks * 512)

    def usage(self) -> Usage:
        """Costs one stat(2) for each file."""
        self._check_marker()
        system = os.statvfs(self.root)
        allocated = sum(item.allocated for item in self._items())
        others = sum(_allocated_below(self.root / name) for name in ("staging", "aside"))
        return Usage(system.f_blocks * system.f_frsize, system.f_bavail * system.f_frsize, allocated, others)

    def make_sure_of_room(self, needed: int = 0) -> None:
        """Raises CacheFull when `needed` bytes more would leave less than the reserve."""
        system = os.statvfs(self.root)
        free = system.f_bavail * system.f_frsize
        if free - needed < self.reserve:
            raise CacheFull(f"{needed} bytes are needed, {free} are free and {self.reserve} of them reserved")

    # ------------------------------------------------------------ staging

    @contextmanager
    def stage(self, key: UUID) -> Iterator[Stage]:
        """A new directory to make a file in for `key`; with all that is in it, it is gone when the block ends. What an
        earlier attempt for `key` left goes first: it may hold the very space that this one needs. Raises CacheFull."""
        self._check_marker()
        with full_disks_told():
            staging.remove_leftovers(self._staging, key)
            self.make_sure_of_room()
            with staging.made(self._staging, key) as stage:
                self.trace("staged")
                yield stage

    def commit(self, stage: Stage, file: Path, progress: Progress = no_progress) -> str:
        """Make `file`, which lies in the stage and which nobody writes to any more, an image; return its digest.

        The bytes that are there already are success. Durable on return. `progress` counts the bytes that were read, and
        cancels by raising. Raises CacheFull.
        """
        self._check_marker()
        assert file.parent == stage.path
        with full_disks_told():
            _take_over(file)
            digest = synced_digest(file, progress)
            self.trace("hashed")
            try:
                os.link(file, self._home(digest), follow_symlinks=False)
            except FileExistsError:
                self._check_same_size(digest, file)
            self.trace("linked")
            fsync_dir(self._images)
            file.unlink()
        self.trace("committed")
        return digest

    def _check_same_size(self, digest: str, file: Path) -> None:
        """An image that somebody cut is replaced by the one at hand: it is no image any more."""
        if self.path(digest).stat().st_size != file.stat().st_size:
            self.set_aside(digest)
            os.link(file, self._home(digest), follow_symlinks=False)

    def sweep(self) -> list[str]:
        """Remove what dead processes left in staging/, and nothing that is being made; return the names."""
        self._check_marker()
        return staging.remove_leftovers(self._staging)

    # ------------------------------------------------------------ the end of an image

    def evict(self, digest: str) -> None:
        """Remove the image, and what was set aside of it; gone already is success. Who has it open reads on."""
        durable_unlink(self._home(digest))
        self.trace("evicted")
        durable_unlink(self._aside(digest))

    def verify(self, digest: str, progress: Progress = no_progress) -> bool:
        """Read the image from its medium, and say whether its bytes are those that were committed. Raises NotCached."""
        return file_digest(self.path(digest), progress) == digest

    def set_aside(self, digest: str) -> None:
        """Take an image that is none any more out of images/, and keep its bytes to be looked at until it is evicted or
        set aside again. Gone already is success."""
        with suppress(FileNotFoundError):
            os.rename(self._home(digest), self._aside(digest))
        fsync_dir(self._images)
        fsync_dir(self.root / "aside")

    # ------------------------------------------------------------ helpers

    def lock(self, name: str, timeout: float | None = None) -> FileLock:
        """An exclusive lock among all processes that use the cache: `with cache.lock("sweep"): ...`. Its file stays for
        ever, so names are few. Raises ValueError for what is no name, LockTimeout when it is taken."""
        self._check_marker()
        if not _LOCK_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a lock")
        return FileLock(self.root / "locks" / name, timeout)

    @property
    def _images(self) -> Path:
        return self.root / "images"

    @property
    def _staging(self) -> Path:
        return self.root / "staging"

    def _home(self, digest: str) -> Path:
        """Where it lies, or would: every act on an image comes by here."""
        self._check_marker()
        if not _DIGEST.fullmatch(digest):
            raise NotCached(f"{digest!r} is no SHA-256")
        return self._images / f"{digest}.qcow2"

    def _aside(self, digest: str) -> Path:
        return self.root / "aside" / f"{digest}.qcow2"


@contextmanager
def full_disks_told() -> Iterator[None]:
    """Say CacheFull for what the kernel says in a number."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise CacheFull(f"the cache's file system is full: {error.strerror}") from error
        raise


def _take_over(file: Path) -> None:
    """Make the file ours and read-only: it was written in the sandbox, by its user, who could change its mode."""
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise CacheUnusable(f"{file} is no regular file")
        if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(fd, os.geteuid(), os.getegid())
        os.fchmod(fd, 0o444)
    finally:
        os.close(fd)


def _allocated_below(directory: Path) -> int:
    """What lies there may go while we look."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total
