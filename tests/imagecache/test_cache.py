"""Images in their directory: named by their bytes, never changed, and refused where the directory is not the cache."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from blockdev.locks import LockTimeout
from imagecache.cache import MARKER, Cache, Item
from imagecache.errors import CacheFull, CacheUnusable, NotCached
from tests.imagecache.support import KEY, MIB, commit, content, everything
from tests.support.filesystems import mounted

DATA = content("image", 3 * MIB + 17)
DIGEST = hashlib.sha256(DATA).hexdigest()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# ---------------------------------------------------------------- activation


def test_an_empty_directory_becomes_a_cache_once(tmp_path: Path) -> None:
    first, again = Cache(tmp_path), Cache(tmp_path)
    cache_id = first.activate()
    assert (again.activate(), again.activate(cache_id), first.cache_id) == (cache_id, cache_id, cache_id)
    modes = {name: mode(tmp_path / name) for name in ("images", "index", "staging", "aside", "locks", MARKER)}
    assert modes == {"images": 0o755, "index": 0o755, "staging": 0o700, "aside": 0o700, "locks": 0o700, MARKER: 0o444}
    assert everything(tmp_path) == set()


def test_the_modes_are_those_of_an_export_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        cache = Cache(tmp_path)
        cache.activate()
        digest = commit(cache, DATA)
    finally:
        os.umask(old)
    assert (mode(tmp_path / "images"), mode(cache.path(digest))) == (0o755, 0o444)
    (tmp_path / "images").chmod(0o700)
    cache.activate()
    assert mode(tmp_path / "images") == 0o755


def test_an_interrupted_beginning_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "lost+found").mkdir()
    assert Cache(tmp_path).activate() == Cache(tmp_path).activate()


def test_many_make_one_cache_of_a_directory(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def activate(_: int) -> object:
        start.wait()
        return Cache(tmp_path).activate()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(activate, range(8)))) == 1
    assert everything(tmp_path) == set()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: (root / "notes").write_text("x"), "neither a cache nor empty: it holds 'notes'"),
        (lambda root: ((root / "images").mkdir(), (root / "images" / "x").touch()), "has lost its .stratus-cache"),
        (lambda root: (root / MARKER).write_text("x"), "holds no uuid"),
        (lambda root: (root / MARKER).write_text(str(uuid4())), "images is missing"),
        (lambda root: root.rmdir(), "No such file"),
    ],
)
def test_what_is_no_cache_is_left_alone(tmp_path: Path, make, said: str) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "root"
    root.mkdir()
    make(root)
    before = everything(tmp_path)
    with pytest.raises(CacheUnusable, match=said):
        Cache(root).activate()
    assert everything(tmp_path) == before


def test_a_cache_whose_file_system_is_not_mounted_is_refused(tmp_path: Path) -> None:
    """Before it is activated, after that in every act, and when another cache is mounted there."""
    with mounted("tmpfs", 16 * MIB, tmp_path) as point:
        cache = Cache(point)
        cache_id = cache.activate()
        digest = commit(cache, DATA)
        assert cache.path(digest).exists()
    point.mkdir()
    for act in (
        lambda: cache.activate(cache_id),
        lambda: cache.path(digest),
        lambda: cache.evict(digest),
        lambda: cache.set_aside(digest),
        lambda: cache.inventory(),
        lambda: cache.usage(),
        lambda: cache.sweep(),
        lambda: cache.lock("x"),
        lambda: cache.verify(digest),
        lambda: commit(cache, DATA),
    ):
        with pytest.raises(CacheUnusable, match="is its file system mounted"):
            act()
    other = Cache(point)
    other.activate()
    with pytest.raises(CacheUnusable, match=f"not {cache_id}: what is mounted there"):
        cache.activate(cache_id)


def test_a_directory_of_it_on_another_file_system_is_refused(cache: Cache) -> None:
    (cache.root / "images").rmdir()
    with mounted("tmpfs", MIB, cache.root) as point:
        (cache.root / "images").symlink_to(point)
        with pytest.raises(CacheUnusable, match="no directory"):
            cache.activate()


# ---------------------------------------------------------------- images


def test_a_committed_file_is_an_image_for_ever(cache: Cache) -> None:
    assert commit(cache, DATA) == DIGEST
    path = cache.path(DIGEST)
    assert (path, mode(path), path.read_bytes()) == (cache.root / "images" / f"{DIGEST}.qcow2", 0o444, DATA)
    assert cache.inventory() == [Item(DIGEST, len(DATA), path.stat().st_blocks * 512)]
    assert everything(cache.root) == {f"images/{DIGEST}.qcow2"}


def test_a_file_made_by_somebody_else_becomes_ours(cache: Cache) -> None:
    """The sandbox's user, who could change its mode again."""
    with cache.stage(KEY) as stage:
        file = stage.path / "image"
        file.write_bytes(DATA)
        if os.geteuid() == 0:
            os.chown(file, 65534, 65534)
        file.chmod(0o666)
        cache.commit(stage, file)
    found = cache.path(DIGEST).stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), os.getegid(), 0o444)


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_only_a_regular_file_becomes_an_image(cache: Cache, kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)  # whatever the umask
    make = {"link": lambda file: file.symlink_to(secret), "directory": Path.mkdir, "fifo": os.mkfifo}[kind]
    with cache.stage(KEY) as stage:
        make(stage.path / "image")
        with pytest.raises((OSError, CacheUnusable)):
            cache.commit(stage, stage.path / "image")
    assert (everything(cache.root), mode(secret)) == (set(), 0o644)


def test_the_same_bytes_are_one_image_however_often_committed(cache: Cache) -> None:
    commit(cache, DATA)
    inode = cache.path(DIGEST).stat().st_ino
    assert commit(cache, DATA, uuid4()) == DIGEST
    assert cache.path(DIGEST).stat().st_ino == inode
    assert everything(cache.root) == {f"images/{DIGEST}.qcow2"}


def test_many_commit_the_same_bytes_at_once(cache: Cache) -> None:
    start = threading.Barrier(6)

    def one(_: int) -> str:
        with cache.stage(uuid4()) as stage:
            (stage.path / "image").write_bytes(DATA)
            start.wait()
            return cache.commit(stage, stage.path / "image")

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(one, range(6))) == {DIGEST}
    assert everything(cache.root) == {f"images/{DIGEST}.qcow2"}
    assert cache.verify(DIGEST)


def test_a_commit_tells_its_progress_and_can_be_cancelled(cache: Cache) -> None:
    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        assert (done, total) == (MIB, len(DATA))
        raise Cancelled

    with cache.stage(KEY) as stage:
        (stage.path / "image").write_bytes(DATA)
        with pytest.raises(Cancelled):
            cache.commit(stage, stage.path / "image", cancel)
    assert everything(cache.root) == set()


@pytest.mark.parametrize("digest", [DIGEST, "../../etc/passwd", "", DIGEST.upper(), DIGEST + "\n"])
def test_what_is_not_there_is_not_cached(cache: Cache, digest: str) -> None:
    for ask in (cache.path, cache.item, cache.verify):
        with pytest.raises(NotCached):
            ask(digest)


def test_a_link_in_the_place_of_an_image_is_none(cache: Cache) -> None:
    (cache.root / "images" / f"{DIGEST}.qcow2").symlink_to("/etc/passwd")
    with pytest.raises(NotCached):
        cache.path(DIGEST)
    assert cache.inventory() == []


def test_an_operators_files_are_not_spoken_of(cache: Cache) -> None:
    (cache.root / "images" / "notes.txt").write_text("x")
    (cache.root / "images" / f"{DIGEST}.qcow2.bak").write_text("x")
    assert cache.inventory() == []


def test_evicted_is_gone_and_can_be_evicted_again(cache: Cache) -> None:
    commit(cache, DATA)
    with cache.path(DIGEST).open("rb") as reader:
        cache.evict(DIGEST)
        cache.evict(DIGEST)
        assert reader.read() == DATA
    assert everything(cache.root) == set()


# ---------------------------------------------------------------- rot


@pytest.mark.parametrize("harm", ["flipped", "cut", "grown"])
def test_rot_is_found_and_set_aside_and_gone_with_the_image(cache: Cache, harm: str) -> None:
    commit(cache, DATA)
    path = cache.path(DIGEST)
    assert cache.verify(DIGEST)
    path.write_bytes({"flipped": b"\xff" + DATA[1:], "cut": DATA[:-1], "grown": DATA + b"x"}[harm])
    assert not cache.verify(DIGEST)
    cache.set_aside(DIGEST)
    cache.set_aside(DIGEST)
    with pytest.raises(NotCached):
        cache.path(DIGEST)
    assert everything(cache.root) == {f"aside/{DIGEST}.qcow2"}
    commit(cache, DATA)
    assert cache.verify(DIGEST)
    cache.evict(DIGEST)
    assert everything(cache.root) == set()


def test_a_cut_image_gives_way_to_a_whole_one(cache: Cache) -> None:
    commit(cache, DATA)
    cache.path(DIGEST).write_bytes(DATA[:100])
    commit(cache, DATA)
    assert cache.path(DIGEST).read_bytes() == DATA
    assert everything(cache.root) == {f"images/{DIGEST}.qcow2", f"aside/{DIGEST}.qcow2"}


def test_a_scrub_tells_its_progress_and_can_be_cancelled(cache: Cache) -> None:
    commit(cache, DATA)
    seen: list[tuple[int, int]] = []
    cache.verify(DIGEST, lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(DATA)) for done in (MIB, 2 * MIB, 3 * MIB, len(DATA))]

    def cancel(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cache.verify(DIGEST, cancel)


# ---------------------------------------------------------------- room


def test_usage_counts_what_lies_on_the_disk(cache: Cache) -> None:
    before = cache.usage()
    assert (before.allocated, before.others) == (0, 0)
    commit(cache, DATA)
    with cache.stage(KEY) as stage:
        (stage.path / "half").write_bytes(DATA)
        usage = cache.usage()
    assert usage.allocated == cache.item(DIGEST).allocated >= len(DATA)
    assert usage.others >= len(DATA)
    assert usage.size == before.size >= usage.free > 0


def test_a_full_disk_is_said_and_leaves_nothing(small_cache: Cache) -> None:
    commit(small_cache, DATA)
    with pytest.raises(CacheFull) as full:
        commit(small_cache, content("large", 20 * MIB))
    assert full.value.code == "image-cache-full"
    assert everything(small_cache.root) == {f"images/{DIGEST}.qcow2"}
    assert commit(small_cache, content("fits", MIB))


def test_what_is_reserved_for_others_is_kept_free(small_cache: Cache) -> None:
    small_cache.reserve = 8 * MIB
    small_cache.make_sure_of_room(7 * MIB)
    with pytest.raises(CacheFull, match="reserved"):
        small_cache.make_sure_of_room(9 * MIB)
    small_cache.reserve = 17 * MIB
    with pytest.raises(CacheFull), small_cache.stage(KEY):
        pass
    assert everything(small_cache.root) == set()


# ---------------------------------------------------------------- locks


def test_a_lock_excludes_other_processes(cache: Cache) -> None:
    code = (
        "import sys, pathlib; from imagecache.cache import Cache\n"
        "cache = Cache(pathlib.Path(sys.argv[1])); cache.activate()\n"
        "sys.exit(cache.lock('scrub').try_lock())"
    )
    other = [sys.executable, "-c", code, str(cache.root)]
    with cache.lock("scrub"):
        assert subprocess.run(other).returncode == 0
        with pytest.raises(LockTimeout):
            cache.lock("scrub", 0.01).acquire()
        with cache.lock("other"):
            pass
    assert subprocess.run(other).returncode == 1


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 201])
def test_a_lock_has_a_plain_name(cache: Cache, name: str) -> None:
    with pytest.raises(ValueError, match="no name for a lock"):
        cache.lock(name)
