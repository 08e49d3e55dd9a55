"""From a server, an upload or a disk into the cache, and on into a pool; and whatever goes wrong leaves nothing."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import zstandard

from blockdev import loop
from imagecache import errors
from imagecache.cache import Cache
from imagecache.entries import Entry, Fetched, Stored
from imagecache.errors import CacheFull, ImageError, NotCached, TargetFull, TooLarge, WrongDigest, WrongSize
from imagecache.inspect import ImageLimits
from imagecache.store import Store
from tests.imagecache.hostile import HOSTILE, over, u64
from tests.imagecache.support import (
    KEY,
    MIB,
    content,
    everything,
    make_qcow2,
    make_raw,
    no_progress,
    qemu_img,
    stopped_at,
    store,
    wanted,
)
from tests.support.filesystems import mounted
from tests.support.origin import Origin

SIZE = 8 * MIB
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}


def sums(data: bytes) -> dict[str, str]:
    return {name: hashlib.new(name, data).hexdigest() for name in ("sha1", "sha256", "sha512")}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as origin:
        yield origin


@pytest.fixture
def images(cache: Cache) -> Store:
    return store(cache)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("raw") / "disk")


@pytest.fixture(scope="module")
def qcow2(raw: Path) -> Path:
    return make_qcow2(raw.with_name("qcow2"), raw=raw)


def is_image(cache: Cache, stored: Stored, raw: Path) -> bool:
    """The one image in the cache, and of that content."""
    path = cache.path(stored.digest)
    assert everything(cache.root) == {f"images/{stored.digest}.qcow2"}
    assert hashlib.sha256(path.read_bytes()).hexdigest() == stored.digest
    assert (stored.file_size, stored.allocated) == (path.stat().st_size, path.stat().st_blocks * 512)
    return "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, path)


# ---------------------------------------------------------------- from a server


@pytest.mark.parametrize(("format", "compression"), [("qcow2", None), ("raw", None), *(("raw", c) for c in COMPRESS)])
def test_an_image_is_fetched(
    cache: Cache, images: Store, origin: Origin, raw: Path, qcow2: Path, format: str, compression: str | None
) -> None:
    data = (raw if format == "raw" else qcow2).read_bytes()
    origin.put("/image", COMPRESS[compression](data) if compression else data)
    stored = images.add(KEY, wanted(origin.url("/image"), checksums=sums(data)), format, no_progress)
    assert (stored.source_format, stored.size) == (format, SIZE)
    assert stored.source_digests["sha256"] == sums(data)["sha256"]
    assert is_image(cache, stored, raw)


def test_one_content_is_one_image_however_it_came(
    cache: Cache, images: Store, origin: Origin, raw: Path, qcow2: Path
) -> None:
    origin.put("/raw", raw.read_bytes())
    origin.put("/qcow2", qcow2.read_bytes())
    digests = {images.add(uuid4(), wanted(origin.url(path)), None, no_progress).digest for path in ("/raw", "/qcow2")}
    digests.add(images.add_disk(uuid4(), raw, SIZE, no_progress).digest)
    assert len(digests) == len(cache.inventory()) == 1


def test_what_came_is_judged_before_anybody_looks_at_it(
    cache: Cache, images: Store, origin: Origin, qcow2: Path
) -> None:
    """And the entry that was found says what it is, if nobody did."""
    origin.put("/image", qcow2.read_bytes())
    seen: list[Fetched] = []

    def refuse(fetched: Fetched) -> Entry:
        seen.append(fetched)
        raise errors.NoEntry("nobody knows it")

    with pytest.raises(errors.NoEntry):
        images.add(KEY, wanted(origin.url("/image")), None, no_progress, refuse)
    assert seen[0].digests == sums(qcow2.read_bytes())
    assert everything(cache.root) == set()
    with pytest.raises(errors.BadFormat):
        images.add(KEY, wanted(origin.url("/image")), None, no_progress, lambda _: Entry("test", format="raw"))
    assert images.add(KEY, wanted(origin.url("/image")), None, no_progress, lambda _: None).source_format == "qcow2"


#: From the list of hostile disks, with all the rest around them.
AS_FETCHED = (
    "truncated qcow2", "1 EiB", "backing file", "json: backing", "data-file", "unknown feature bit", "LUKS1",
    "internal snapshot", "L1 table past the end", "raw that is a qcow2", "qcow2+ISO polyglot", "VMDK descriptor",
    "flatten: one cluster many times",
)  # fmt: skip


@pytest.mark.parametrize("name", AS_FETCHED)
def test_hostile_images_leave_nothing(cache: Cache, images: Store, origin: Origin, place: Path, name: str) -> None:
    make, told, error = HOSTILE[name]
    make(place / "image")
    origin.put("/image", (place / "image").read_bytes())
    with pytest.raises(error):
        images.add(KEY, wanted(origin.url("/image")), told, no_progress)
    assert everything(cache.root) == set()


def test_wrong_bytes_leave_nothing(cache: Cache, images: Store, origin: Origin, raw: Path) -> None:
    data = raw.read_bytes()
    origin.put("/image", data)
    bomb = gzip.compress(bytes(64 * MIB))
    origin.put("/bomb", bomb)
    origin.put("/cut", gzip.compress(data)[:-4000])
    refused: list[tuple[type[ImageError], str, dict[str, object]]] = [
        (WrongDigest, "/image", {"checksums": sums(b"other")}),
        (WrongSize, "/image", {"size": SIZE - 1}),
        (TooLarge, "/image", {"max_size": SIZE - 1}),
        (TooLarge, "/bomb", {"max_size": 16 * MIB, "checksums": sums(bomb)}),
        (errors.Truncated, "/cut", {}),
        (errors.BadCompression, "/image", {"compression": "gz"}),
        (errors.Unreachable, "/nowhere", {}),
    ]
    for error, path, facts in refused:
        with pytest.raises(error):
            images.add(KEY, wanted(origin.url(path), **facts), "raw", no_progress)
        assert everything(cache.root) == set()
    assert len({error.code for error, _, _ in refused}) == len(refused) - 1


def test_a_bomb_behind_a_small_disk_is_stopped_by_what_may_come_out(cache: Cache, origin: Origin) -> None:
    origin.put("/image", gzip.compress(bytes(64 * MIB)))
    with pytest.raises(TooLarge):
        store(cache, ImageLimits(32 * MIB, 1 << 30)).add(KEY, wanted(origin.url("/image")), "raw", no_progress)
    assert everything(cache.root) == set()


def test_a_full_disk_leaves_nothing(small_cache: Cache, origin: Origin) -> None:
    """Full while it is fetched, and full while it is flattened."""
    for size in (20 * MIB, 10 * MIB):
        origin.put("/image", content("much", size))
        with pytest.raises(CacheFull):
            store(small_cache).add(KEY, wanted(origin.url("/image")), "raw", no_progress)
        assert everything(small_cache.root) == set()


def test_what_is_reserved_for_others_is_left_to_them(small_cache: Cache, origin: Origin) -> None:
    small_cache.reserve = 8 * MIB
    origin.put("/image", content("much", 15 * MIB))
    with pytest.raises(CacheFull, match="reserved"):
        store(small_cache).add(KEY, wanted(origin.url("/image"), size=15 * MIB), "raw", no_progress)
    assert origin.served("/image") == 0
    with pytest.raises(CacheFull, match="reserved"):
        store(small_cache).add(KEY, wanted(origin.url("/image")), "raw", no_progress)
    assert everything(small_cache.root) == set()


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("part", [0.0, 0.2, 0.6, 1.0])
def test_progress_is_told_and_cancels_wherever_it_is(cache: Cache, images: Store, origin: Origin, part: float) -> None:
    data = content("much", 16 * MIB)
    origin.put("/image", data, pause=0.005)
    seen: list[float] = []

    def cancel(done: int, total: int) -> None:
        seen.append(done / total if total else 0.0)
        if seen[-1] >= part:
            raise Cancelled

    with pytest.raises(Cancelled):
        images.add(KEY, wanted(origin.url("/image")), "raw", cancel)
    assert everything(cache.root) == set()
    assert (seen, max(seen) <= 1.0) == (sorted(seen), True)


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize(
    "step", ["staged", "fetching", "fetched", "inspected", "flattening", "flattened", "hashed", "linked", "committed"]
)
def test_killed_at_each_step(cache: Cache, images: Store, origin: Origin, step: str) -> None:
    """What is handed out is whole and verified, or not there; the next attempt finds room and ends well."""
    data = content("disk", 8 * MIB)
    origin.put("/image", data, pause=0.02 if step == "fetching" else 0.0)
    with stopped_at(step, cache.root, "add", origin.url("/image")):
        assert cache.sweep() == []
    there = step in ("linked", "committed")
    assert len(cache.inventory()) == there
    assert all(cache.verify(item.digest) for item in cache.inventory())
    origin.put("/image", data)
    stored = images.add(KEY, wanted(origin.url("/image")), "raw", no_progress)
    assert everything(cache.root) == {f"images/{stored.digest}.qcow2"}
    assert cache.verify(stored.digest)


# ---------------------------------------------------------------- uploads


@pytest.mark.parametrize("compression", [None, "zst"])
def test_an_upload_is_kept(cache: Cache, images: Store, raw: Path, tmp_path: Path, compression: str | None) -> None:
    data, upload = raw.read_bytes(), tmp_path / "upload"
    upload.write_bytes(COMPRESS[compression](data) if compression else data)
    upload.chmod(0o600)
    seen: list[tuple[int, int]] = []
    stored = images.add_file(
        KEY, upload, compression=compression, format="raw", checksums=sums(upload.read_bytes()),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert stored.source_digests["sha256"] == sums(data)["sha256"]
    assert is_image(cache, stored, raw)
    assert upload.exists()
    assert seen == sorted(seen)
    assert seen[-1] == (2 * upload.stat().st_size,) * 2


def test_a_bad_upload_is_refused_and_leaves_nothing(cache: Cache, images: Store, raw: Path, tmp_path: Path) -> None:
    upload = tmp_path / "upload"
    upload.write_bytes(gzip.compress(raw.read_bytes()))
    cases: list[tuple[type[ImageError], dict[str, object]]] = [
        (WrongDigest, {"checksums": sums(b"other")}),
        (errors.BadCompression, {"compression": "xz"}),
        (errors.BadFormat, {"format": "qcow2"}),
    ]
    for error, facts in cases:
        facts = {"compression": "gz", "format": "raw", "checksums": {}} | facts
        with pytest.raises(error):
            images.add_file(KEY, upload, progress=no_progress, **facts)  # type: ignore[arg-type]
        assert everything(cache.root) == set()
    upload.chmod(0o600)
    upload.write_bytes(gzip.compress(bytes(64 * MIB)))
    with pytest.raises(TooLarge):
        store(cache, ImageLimits(SIZE, SIZE)).add_file(
            KEY, upload, compression=None, format="raw", checksums={}, progress=no_progress
        )
    assert everything(cache.root) == set()


# ---------------------------------------------------------------- disks of guests


@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_disk_becomes_an_image(cache: Cache, images: Store, raw: Path, kind: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(raw.read_bytes())
    disk.chmod(0o600)
    if kind == "file":
        stored = images.add_disk(KEY, disk, SIZE, no_progress)
    else:
        with loop.attached(disk) as device:
            stored = images.add_disk(KEY, device, SIZE, no_progress)
    assert (stored.source_format, stored.source_digests) == ("raw", {})
    assert is_image(cache, stored, raw)
    assert disk.stat().st_mode & 0o777 == 0o600


def test_a_guests_disk_is_raw_whatever_it_holds(
    cache: Cache, images: Store, raw: Path, place: Path, tmp_path: Path
) -> None:
    """A guest may write a header into its disk that names a file of the host."""
    header = over(make_qcow2(place / "header"), (8, u64(512) + b"\0\0\0\x0b"), (512, b"/etc/passwd")).read_bytes()
    disk = tmp_path / "disk"
    disk.write_bytes(header.ljust(SIZE, b"\0"))
    stored = images.add_disk(KEY, disk, SIZE, no_progress)
    assert is_image(cache, stored, disk)


def test_a_disk_of_another_size_is_not_taken(cache: Cache, images: Store, raw: Path) -> None:
    with pytest.raises(WrongSize):
        images.add_disk(KEY, raw, SIZE + 512, no_progress)
    assert everything(cache.root) == set()


# ---------------------------------------------------------------- into a pool


@pytest.mark.parametrize("kind", ["file", "device"])
def test_an_image_goes_into_a_pool(images: Store, raw: Path, kind: str, tmp_path: Path) -> None:
    digest = images.add_disk(KEY, raw, SIZE, no_progress).digest
    target = tmp_path / "volume"
    with target.open("wb") as file:
        file.truncate(SIZE + MIB)
    target.chmod(0o600)
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    if kind == "file":
        assert images.to_raw(digest, target, progress) == SIZE
    else:
        with loop.attached(target) as device:
            assert images.to_raw(digest, device, progress, reads_as_zeros=True) == SIZE
    assert target.read_bytes() == raw.read_bytes() + bytes(MIB)
    assert target.stat().st_blocks * 512 < 3 * MIB
    assert (target.stat().st_uid, target.stat().st_mode & 0o777) == (os.geteuid(), 0o600)
    assert (seen, seen[-1]) == (sorted(seen), (SIZE, SIZE))


def test_old_bytes_in_a_pool_are_written_over(images: Store, raw: Path, tmp_path: Path) -> None:
    digest = images.add_disk(KEY, raw, SIZE, no_progress).digest
    target = tmp_path / "volume"
    target.write_bytes(b"old!" * (SIZE // 4))
    images.to_raw(digest, target, no_progress)
    assert target.read_bytes() == raw.read_bytes()


def test_a_target_that_is_too_small_or_full_is_said(images: Store, raw: Path, tmp_path: Path) -> None:
    digest = images.add_disk(KEY, raw, SIZE, no_progress).digest
    target = tmp_path / "volume"
    target.write_bytes(bytes(SIZE - 512))
    with pytest.raises(WrongSize):
        images.to_raw(digest, target, no_progress)
    with pytest.raises(NotCached):
        images.to_raw("0" * 64, target, no_progress)
    with mounted("tmpfs", MIB, tmp_path) as small:
        with (small / "volume").open("wb") as file:
            file.truncate(SIZE)
        with pytest.raises(TargetFull):
            images.to_raw(digest, small / "volume", no_progress)


def test_writing_into_a_pool_can_be_cancelled(images: Store, raw: Path, tmp_path: Path) -> None:
    digest = images.add_disk(KEY, raw, SIZE, no_progress).digest
    with (tmp_path / "volume").open("wb") as file:
        file.truncate(SIZE)

    def cancel(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        images.to_raw(digest, tmp_path / "volume", cancel)
