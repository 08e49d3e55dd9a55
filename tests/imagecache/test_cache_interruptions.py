"""Work on the cache that is killed, stopped or cut off leaves all of an image or nothing that could be handed out."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from imagecache.cache import MARKER, Cache
from tests.imagecache.support import KEY, commit, content, everything, stopped_at
from tests.support.filesystems import after_power_cut

TEXT = "bytes of an image"
DIGEST = hashlib.sha256(TEXT.encode()).hexdigest()
IMAGE, ASIDE = f"images/{DIGEST}.qcow2", f"aside/{DIGEST}.qcow2"


def seen(cache: Cache) -> set[str]:
    """What is there, staging left out."""
    return {name for name in everything(cache.root) if not name.startswith("staging/")}


@pytest.mark.parametrize("step", ["staged", "hashed", "linked", "committed"])
def test_a_commit_killed_at_each_step(cache: Cache, step: str) -> None:
    with stopped_at(step, cache.root, "commit", TEXT):
        assert cache.sweep() == []
    there = step in ("linked", "committed")
    assert seen(cache) == ({IMAGE} if there else set())
    assert [item.digest for item in cache.inventory()] == ([DIGEST] if there else [])
    assert len(cache.sweep()) == 1
    assert everything(cache.root) == ({IMAGE} if there else set())
    assert commit(cache, TEXT.encode()) == DIGEST
    assert cache.verify(DIGEST)
    assert everything(cache.root) == {IMAGE}


def test_an_eviction_killed_in_the_middle_is_done_again(cache: Cache) -> None:
    commit(cache, TEXT.encode())
    cache.set_aside(DIGEST)
    commit(cache, TEXT.encode())
    with stopped_at("evicted", cache.root, "evict", DIGEST):
        pass
    assert everything(cache.root) == {ASIDE}
    cache.evict(DIGEST)
    assert everything(cache.root) == set()


def test_a_new_attempt_clears_what_the_last_one_left(cache: Cache) -> None:
    with stopped_at("hashed", cache.root, "commit", TEXT):
        pass
    assert len(everything(cache.root)) == 2  # the file, and the lock of its stage
    commit(cache, content("other", 100), uuid4())
    assert len(everything(cache.root)) == 3
    commit(cache, TEXT.encode(), KEY)
    assert len(everything(cache.root)) == 2
    assert cache.sweep() == []


def test_sweep_spares_a_process_that_only_sleeps_and_its_rival(cache: Cache) -> None:
    """A worker thought dead wakes up when its successor has done the work."""
    with stopped_at("hashed", cache.root, "commit", TEXT) as process:
        process.send_signal(signal.SIGSTOP)
        assert cache.sweep() == []
        assert commit(cache, TEXT.encode()) == DIGEST
        assert len(everything(cache.root)) == 3
    assert len(cache.sweep()) == 1
    assert everything(cache.root) == {IMAGE}


def test_sweep_takes_only_leftovers_of_ours(cache: Cache) -> None:
    staging = cache.root / "staging"
    leftovers = sorted(f"{uuid4()}.0123abcd" for _ in range(3))
    for name in [*leftovers, "notes", f"{uuid4()}", f"{uuid4()}.0123abcd.bak"]:
        (staging / name).mkdir()
        (staging / name / "deep").mkdir()
        (staging / name / "deep" / "file").write_bytes(b"x")
    (staging / f"{uuid4()}.0123abce").write_text("a file")
    assert cache.sweep() == leftovers
    assert cache.sweep() == []
    assert len(list(staging.iterdir())) == 4


def test_no_sweep_takes_a_stage_that_is_being_made(cache: Cache) -> None:
    """Not even between the making of its directory and of its lock."""
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            cache.sweep()

    def make(_: int) -> bool:
        with cache.stage(uuid4()) as stage:
            (stage.path / "file").write_bytes(b"x")
            cache.sweep()
            return (stage.path / "file").exists()

    with ThreadPoolExecutor(5) as pool:
        sweeping = pool.submit(sweep)
        assert all(pool.map(make, range(400)))
        done.set()
        sweeping.result()
    assert everything(cache.root) == set()


def test_a_half_made_cache_is_finished_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / f"{KEY}.00000000").mkdir()
    (tmp_path / "staging" / f"{KEY}.00000000" / MARKER).write_text("half")
    cache = Cache(tmp_path)
    cache.activate()
    assert cache.sweep() == [f"{KEY}.00000000"]
    assert everything(tmp_path) == set()


LAST_CALLS = {
    "commit": (lambda cache: commit(cache, TEXT.encode()), {IMAGE}),
    "commit again": (lambda cache: (commit(cache, TEXT.encode()), commit(cache, TEXT.encode())), {IMAGE}),
    "evict": (lambda cache: (commit(cache, TEXT.encode()), cache.evict(DIGEST)), set[str]()),
    "set aside": (lambda cache: (commit(cache, TEXT.encode()), cache.set_aside(DIGEST)), {ASIDE}),
}


@pytest.mark.parametrize("last_call", LAST_CALLS)
def test_a_call_that_returned_survives_a_power_cut(xfs: Path, tmp_path: Path, last_call: str) -> None:
    root = xfs / f"power {last_call}"
    root.mkdir()
    cache = Cache(root)
    cache_id = cache.activate()
    os.sync()
    call, expected = LAST_CALLS[last_call]
    call(cache)
    with after_power_cut(xfs, tmp_path) as survived:
        found = Cache(survived / root.name)
        found.activate(cache_id)
        found.sweep()
        assert everything(found.root) == expected
        assert [found.verify(item.digest) for item in found.inventory()] == [True] * (IMAGE in expected)


def test_a_new_cache_survives_a_power_cut(xfs: Path, tmp_path: Path) -> None:
    root = xfs / "new"
    root.mkdir()
    os.sync()
    cache_id = Cache(root).activate()
    with after_power_cut(xfs, tmp_path) as survived:
        assert Cache(survived / "new").activate(cache_id) == cache_id
