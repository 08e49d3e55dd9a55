"""Images made and given: from a network, an upload or a disk into the cache, and from the cache into a pool.

    source ──fetch──▶ staged, with the right digest ──inspect, flatten──▶ a fresh qcow2 ──commit──▶ the cache

All of one image happens in one stage, so whatever ends it, and whenever, leaves nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from blockdev import loop
from blockdev.extents import Progress
from imagecache import sandboxed_qemu
from imagecache.cache import Cache, full_disks_told
from imagecache.decompress import recognised
from imagecache.entries import Entry, Fetched, Stored
from imagecache.errors import CacheFull, TargetFull, WrongSize
from imagecache.fanout import Digests
from imagecache.fetch import Wanted, fetch, verified
from imagecache.inspect import ImageLimits, Inspection, flatten, inspect
from imagecache.sandbox import Sandbox
from imagecache.staging import Stage
from imagecache.streams import Arrived, Pipeline
from imagecache.web import Web

_CHUNK = 1 << 20

Accept = Callable[[Fetched], Entry | None]


class Store:
    """`progress(done, total)` of its methods counts bytes of the source, twice: once as they are brought and once as
    they are flattened (total 0: not known). It is called several times a second and cancels by raising. CacheFull is
    raised where there is too little room; the other refusals are those of fetch and inspect. What killed ones left
    outside the cache goes when a new one is made."""

    def __init__(self, cache: Cache, web: Web, sandbox: Sandbox, limits: ImageLimits) -> None:
        self._cache = cache
        self._web = web
        self._sandbox = sandbox
        self._limits = limits
        sandbox.sweep()

    def add(
        self, key: UUID, wanted: Wanted, format: str | None, progress: Progress, accept: Accept | None = None
    ) -> Stored:
        """Fetch an image and keep it. `accept` looks at what came before anybody else does, raises if it is not to be
        kept, and may return the entry that it found: its format counts if none was told."""
        with self._cache.stage(key) as stage:
            self._cache.make_sure_of_room(wanted.size or 0)
            source, progress = stage.path / "source", self._watched(progress)

            def bring(done: int, total: int) -> None:
                progress(done, 2 * total)

            fetched = fetch(self._web, self._sandbox, wanted, source, bring, durable=False)
            self._cache.trace("fetched")
            entry = accept(fetched) if accept else None
            told = format or (entry.format if entry else None)
            return self._keep(stage, source, told, fetched.digests, _second_half(progress, fetched.stored_size))

    def add_file(
        self,
        key: UUID,
        path: Path,
        *,
        compression: str | None,
        format: str | None,
        checksums: Mapping[str, str],
        progress: Progress,
    ) -> Stored:
        """Keep an upload: a file that nobody writes to any more, and that stays the caller's. It is made readable for
        all, as the sandbox's user must read it, and not copied unless it is compressed."""
        wanted = Wanted((), checksums, None, compression, self._limits.max_source_size)
        with self._cache.stage(key) as stage:
            progress = self._watched(progress)
            source, arrived = self._brought(stage, path, wanted, lambda done, total: progress(done, 2 * total))
            verified(wanted, path.name, arrived)
            self._cache.trace("fetched")
            return self._keep(stage, source, format, arrived.digests, _second_half(progress, arrived.stored_size))

    def add_disk(self, key: UUID, path: Path, size: int, progress: Progress) -> Stored:
        """Keep the content of a volume or snapshot of `size` bytes, a file or block device that nobody writes to. It is
        a guest's: raw whatever it holds. The digest of what comes of it is the only one. Raises WrongSize."""
        with self._cache.stage(key) as stage, _readable(path) as source:
            found = _size_of(source)
            if found != size:
                raise WrongSize(f"the disk has {found} bytes, not {size}")
            return self._flattened(stage, source, Inspection("raw", size), {}, self._watched(progress))

    def to_raw(self, digest: str, target: Path, progress: Progress, *, reads_as_zeros: bool = False) -> int:
        """Write an image to an existing file or block device, durably, and return its size in bytes; what `target`
        holds beyond stays. After any failure it is to be made anew; after a kill a file may still be the sandbox's
        user's. Zeros are left out where `target` reads as zeros already: as the caller says, or as a file
        without any blocks does. Raises NotCached, WrongSize (a target too small), TargetFull, Damaged, SandboxFailed.
        """
        image = self._cache.path(digest)
        size = inspect(self._sandbox, image, "qcow2", self._limits).size
        if _size_of(target) < size:
            raise WrongSize(f"the target has {_size_of(target)} bytes, the image {size}")
        found = target.stat()
        zeros = reads_as_zeros or (stat.S_ISREG(found.st_mode) and found.st_blocks == 0)
        try:
            sandboxed_qemu.to_raw(self._sandbox, image, target, size=size, reads_as_zeros=zeros, progress=progress)
            self._cache.trace("written")
            with full_disks_told(), target.open("rb", buffering=0) as file:
                os.fsync(file.fileno())
        except CacheFull as error:
            raise TargetFull(f"{target.name}: {error}") from error
        return size

    # ------------------------------------------------------------ steps

    def _keep(
        self, stage: Stage, source: Path, format: str | None, digests: Mapping[str, str], progress: Progress
    ) -> Stored:
        inspection = inspect(self._sandbox, source, format, self._limits)
        self._cache.trace("inspected")
        return self._flattened(stage, source, inspection, digests, progress)

    def _flattened(
        self, stage: Stage, source: Path, inspection: Inspection, digests: Mapping[str, str], progress: Progress
    ) -> Stored:
        made = stage.path / "image.qcow2"
        flatten(self._sandbox, source, inspection, made, self._limits, progress)
        self._cache.trace("flattened")
        if source.parent == stage.path:
            source.unlink()
        digest = self._cache.commit(stage, made, lambda done, total: progress(inspection.size, inspection.size))
        item = self._cache.item(digest)
        return Stored(digest, inspection.size, item.file_size, item.allocated, digests, inspection.format)

    def _brought(self, stage: Stage, path: Path, wanted: Wanted, progress: Progress) -> tuple[Path, Arrived]:
        """The upload as it is to be inspected, and its digests. One that is not compressed is only read."""
        path.chmod(0o444)
        with path.open("rb", buffering=0) as upload:
            head = upload.read(16)
            upload.seek(0)
            if wanted.compression is None and recognised(head) is None:
                return path, _hashed(upload.fileno(), wanted.algorithms, progress)
            unpacked = stage.path / "source"
            with unpacked.open("xb", buffering=0) as target:
                arrived = self._unpacked(upload.fileno(), target.fileno(), wanted, progress)
            unpacked.chmod(0o444)
            return unpacked, arrived

    def _unpacked(self, source: int, target: int, wanted: Wanted, progress: Progress) -> Arrived:
        total, told = os.fstat(source).st_size, 0

        def look() -> None:
            progress(told, total)

        with Pipeline(
            target, self._sandbox, algorithms=wanted.algorithms, compression=wanted.compression,
            limit=wanted.max_size, look=look, durable=False,
        ) as pipeline:  # fmt: skip
            while size := os.readv(source, [pipeline.buffer()]):
                pipeline.push(size)
                told += size
                look()
            return pipeline.finish()

    def _watched(self, progress: Progress) -> Progress:
        """Others live on the same file system: an image ends when it would take what is reserved for them."""

        def watched(done: int, total: int) -> None:
            self._cache.make_sure_of_room()
            progress(done, total)

        return watched


def _second_half(progress: Progress, size: int) -> Progress:
    """What is flattened, in bytes of the source, all of which were brought."""
    return lambda done, total: progress(size + size * done // total, 2 * size)


def _hashed(fd: int, algorithms: tuple[str, ...], progress: Progress) -> Arrived:
    digests, buffer = Digests(algorithms), memoryview(bytearray(_CHUNK))
    done, total = 0, os.fstat(fd).st_size
    while size := os.readv(fd, [buffer]):
        for update in digests.consumers:
            update(buffer[:size])
        done += size
        progress(done, total)
    return Arrived(digests.hex, digests.hex, done, done)


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """A pool's files are closed to the sandbox's user, and who may read them is not changed for this: a loop device
    that only reads stands for one."""
    if os.geteuid() == 0 and path.is_file():
        with loop.attached(path, read_only=True) as device:
            yield device
    else:
        yield path


def _size_of(path: Path) -> int:
    """Of a file or a block device, in bytes."""
    with path.open("rb", buffering=0) as file:
        return file.seek(0, os.SEEK_END)
