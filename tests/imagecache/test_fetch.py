"""Fetching from a real server with every fault, into a real file, through the real sandbox."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from imagecache import fetch as module
from imagecache import streams
from imagecache.entries import ALGORITHMS, Fetched
from imagecache.errors import (
    AddressRefused,
    BadCompression,
    BadUrl,
    CacheFull,
    ImageError,
    SandboxFailed,
    TooLarge,
    Truncated,
    Unreachable,
    WrongDigest,
    WrongSize,
)
from imagecache.fetch import Wanted, fetch
from imagecache.sandbox import Sandbox
from imagecache.web import Web
from tests.support.origin import Origin

MIB = 1 << 20
#: Noise, then nothing, then noise: 5 MiB and a bit.
CONTENT = random.Random(1).randbytes(2 * MIB) + bytes(2 * MIB) + random.Random(2).randbytes(MIB + 4711)
KINDS = ("gz", "bz2", "xz", "zst")
TOOLS = {"gz": ["gzip", "-1c"], "bz2": ["bzip2", "-c"], "xz": ["xz", "-0c"], "zst": ["zstd", "-qc"]}
ALL = {**dict.fromkeys(KINDS), "raw": None}


@cache
def stored(kind: str) -> bytes:
    if kind == "raw":
        return CONTENT
    return subprocess.run(TOOLS[kind], input=CONTENT, stdout=subprocess.PIPE, check=True).stdout


def digests(data: bytes) -> dict[str, str]:
    return {name: hashlib.new(name, data).hexdigest() for name in ALGORITHMS}


SHA256 = {"sha256": hashlib.sha256(CONTENT).hexdigest()}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as started:
        yield started


def quiet(done: int, total: int) -> None:
    pass


class Fetcher:
    """Fetches into one file, which is there afterwards if and only if all went well."""

    def __init__(self, into: Path) -> None:
        self.into = into
        self.web = Web(["127.0.0.0/8"], connect_timeout=5, read_timeout=2)
        self.sandbox = Sandbox()

    def __call__(
        self,
        *locations: str,
        checksums: dict[str, str] | None = None,
        size: int | None = None,
        compression: str | None = None,
        max_size: int = 100 * MIB,
        progress: Callable[[int, int], None] = quiet,
        **options: Any,
    ) -> Fetched:
        wanted = Wanted(locations, SHA256 if checksums is None else checksums, size, compression, max_size)
        self.into.unlink(missing_ok=True)
        before = set(threading.enumerate())
        try:
            done = fetch(self.web, self.sandbox, wanted, self.into, progress, **{"backoff": 0, **options})
            assert self.into.exists()
            return done
        except BaseException:
            assert not self.into.exists()
            raise
        finally:
            assert list(self.into.parent.iterdir()) == [self.into] * self.into.exists()
            ours = set(threading.enumerate()) - before
            assert not [thread for thread in ours if "imagecache" in str(thread)], "threads are left"


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    (tmp_path / "stage").mkdir()
    return Fetcher(tmp_path / "stage" / "image")


@pytest.mark.parametrize("kind", ALL)
def test_an_image_arrives_with_its_digests(origin: Origin, fetcher: Fetcher, kind: str) -> None:
    origin.put("/image", stored(kind))
    done = fetcher(origin.url("/image"), checksums={})
    assert fetcher.into.read_bytes() == CONTENT
    assert done == Fetched(
        origin.url("/image"), digests(stored(kind)), digests(CONTENT), len(stored(kind)), len(CONTENT)
    )
    assert len(origin.requests) == 1


def test_zeros_are_holes_and_everybody_may_read(origin: Origin, fetcher: Fetcher) -> None:
    mask = os.umask(0o077)
    try:
        origin.put("/image", CONTENT + bytes(MIB))
        fetcher(origin.url("/image"), checksums={})
    finally:
        os.umask(mask)
    told = fetcher.into.stat()
    assert (told.st_size, told.st_mode & 0o777) == (len(CONTENT) + MIB, 0o644)
    assert told.st_blocks * 512 <= len(CONTENT) - 2 * MIB + 128 * 1024


@pytest.mark.parametrize("size", [0, 1, 5, MIB - 1, MIB, MIB + 1])
def test_any_size_arrives(origin: Origin, fetcher: Fetcher, size: int) -> None:
    origin.put("/image", CONTENT[:size])
    done = fetcher(origin.url("/image"), checksums={}, size=size)
    assert (fetcher.into.read_bytes(), done.size) == (CONTENT[:size], size)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("of", ["stored", "kept"])
def test_a_digest_may_be_that_of_either_stream(origin: Origin, fetcher: Fetcher, name: str, of: str) -> None:
    origin.put("/image", stored("zst"))
    described = stored("zst") if of == "stored" else CONTENT
    checksums = {name: digests(described)[name]}
    done = fetcher(origin.url("/image"), checksums=checksums, size=len(described))
    assert checksums.items() <= (done.stored_digests if of == "stored" else done.digests).items()
    assert "sha256" in done.digests
    with pytest.raises(WrongSize, match=f"it has {len(described)} bytes, not "):  # the other one's
        fetcher(origin.url("/image"), checksums=checksums, size=len(CONTENT) + len(stored("zst")) - len(described))


def test_no_digest_may_be_wrong_and_the_strongest_is_told(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", CONTENT)
    good, bad = digests(CONTENT), digests(b"another")
    for wrong, told in ((bad["sha1"], "sha1"), (good["sha1"], "sha512")):
        strong = good["sha512"] if told == "sha1" else bad["sha512"]
        with pytest.raises(WrongDigest, match=f"its {told} is"):
            fetcher(origin.url("/image"), checksums={"sha1": wrong, "sha512": strong})


def test_digests_of_two_streams_are_none_of_one_image(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", stored("gz"))
    mixed = {"sha512": digests(CONTENT)["sha512"], "sha256": digests(stored("gz"))["sha256"]}
    with pytest.raises(WrongDigest, match="its sha256 is"):
        fetcher(origin.url("/image"), checksums=mixed)


def test_a_wrong_digest_is_told(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", stored("gz"))
    with pytest.raises(WrongDigest) as wrong:
        fetcher(origin.url("/image"), checksums={"sha256": "0" * 64})
    for each in (digests(stored("gz"))["sha256"], digests(CONTENT)["sha256"], "0" * 64, origin.url("/image")):
        assert each in str(wrong.value)


@pytest.mark.parametrize("checksums", [SHA256, {}])
def test_a_wrong_size_is_told(origin: Origin, fetcher: Fetcher, checksums: dict[str, str]) -> None:
    origin.put("/image", CONTENT)
    for size in (17, len(CONTENT) - 1, len(CONTENT) + 1):
        with pytest.raises(WrongSize, match=f"bytes, not {size}|more than the {size} bytes"):
            fetcher(origin.url("/image"), checksums=checksums, size=size)


@pytest.mark.parametrize("kind", ["raw", "gz"])
def test_no_more_is_read_than_it_should_have(origin: Origin, fetcher: Fetcher, kind: str) -> None:
    """Of many bytes that nobody asked for, the first are enough to know."""
    origin.put("/image", stored(kind) * 100)
    with pytest.raises(WrongSize, match=f"more than the {MIB} bytes"):
        fetcher(origin.url("/image"), size=MIB, max_size=1000 * MIB)
    assert origin.served("/image") < 50 * len(stored(kind))


def test_more_than_is_allowed_is_not_asked_for(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", CONTENT)
    with pytest.raises(TooLarge, match="more than the 1000 that are allowed"):
        fetcher(origin.url("/image"), size=1001, max_size=1000)
    assert origin.requests == []
    with pytest.raises(TooLarge, match="more than the 1000 that are allowed"):
        fetcher(origin.url("/image"), max_size=1000)


def test_a_body_without_an_end_is_cut_at_the_bound(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", bytes(50 * MIB), close_delimited=True)
    with pytest.raises(TooLarge, match=f"more than {3 * MIB} bytes"):
        fetcher(origin.url("/image"), max_size=3 * MIB)
    assert origin.served("/image") < 40 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_is_cut_at_the_bound(origin: Origin, fetcher: Fetcher, kind: str) -> None:
    bomb = subprocess.run(TOOLS[kind], input=bytes(60 * MIB), stdout=subprocess.PIPE, check=True).stdout
    origin.put("/image", bomb)
    with pytest.raises(TooLarge, match=f"more than {3 * MIB} bytes when decompressed"):
        fetcher(origin.url("/image"), max_size=3 * MIB)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_ends_early_is_truncated(origin: Origin, fetcher: Fetcher, kind: str) -> None:
    for size in (len(stored(kind)) - 5, 100_000, 7):
        origin.put("/image", stored(kind)[:size])
        with pytest.raises(Truncated):
            fetcher(origin.url("/image"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [b"garbage", b"g" * 5 * MIB])
def test_what_follows_a_stream_is_refused(origin: Origin, fetcher: Fetcher, kind: str, tail: bytes) -> None:
    origin.put("/image", stored(kind) + tail)
    with pytest.raises(BadCompression):
        fetcher(origin.url("/image"))


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_one_image(origin: Origin, fetcher: Fetcher, kind: str) -> None:
    origin.put("/image", stored(kind) * 2)
    assert fetcher(origin.url("/image"), checksums={}).digests == digests(CONTENT * 2)


@pytest.mark.parametrize(("told", "kind"), [("gz", "raw"), ("gz", "xz"), ("lzma", "xz"), ("zip", "raw")])
def test_a_compression_that_is_not_what_comes_is_refused(
    origin: Origin, fetcher: Fetcher, told: str, kind: str
) -> None:
    origin.put("/image", stored(kind))
    with pytest.raises(BadCompression, match=f"said to be {told}, but"):
        fetcher(origin.url("/image"), compression=told)


# ---------------------------------------------------------------- what breaks off


@pytest.mark.parametrize("kind", ALL)
def test_an_origin_that_dies_and_comes_back_is_resumed(origin: Origin, fetcher: Fetcher, kind: str) -> None:
    at = len(stored(kind)) * 6 // 10
    origin.put("/image", stored(kind), breaks=[at])
    fetcher(origin.url("/image"))
    assert fetcher.into.read_bytes() == CONTENT
    assert origin.served("/image") == len(stored(kind))
    first, second = origin.asked("/image")
    assert ("Range" in first, second["Range"], second["If-Range"]) == (False, f"bytes={at}-", '"one"')


def test_an_origin_that_is_away_for_a_while_is_waited_for(origin: Origin, fetcher: Fetcher) -> None:
    at = 3 * MIB

    def die(offset: int) -> None:
        if offset >= at and not died.is_set():
            died.set()
            threading.Thread(target=restart).start()
            time.sleep(60)  # this thread's connection is cut meanwhile

    def restart() -> None:
        origin.stop()
        stopped.set()
        time.sleep(0.3)
        origin.start()

    died, stopped = threading.Event(), threading.Event()
    origin.put("/image", CONTENT, at=die)
    fetcher(origin.url("/image"), backoff=0.1)
    assert stopped.is_set()
    assert fetcher.into.read_bytes() == CONTENT
    assert origin.served("/image") == len(CONTENT)


def test_many_breaks_are_resumed(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", CONTENT, breaks=[3, 3, 100, MIB + 200, MIB + 201, 4 * MIB])
    fetcher(origin.url("/image"))
    assert origin.served("/image") == len(CONTENT)


@pytest.mark.parametrize("statuses", [[503], [500, 502, 429], [408]])
def test_an_answer_that_may_pass_is_asked_for_again(origin: Origin, fetcher: Fetcher, statuses: list[int]) -> None:
    origin.put("/image", CONTENT, statuses=statuses)
    fetcher(origin.url("/image"))
    assert origin.served("/image") == len(CONTENT)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_final_answer_is_not_asked_for_again(origin: Origin, fetcher: Fetcher, status: int) -> None:
    origin.put("/image", CONTENT, statuses=[status])
    with pytest.raises(Unreachable, match=f"answered {status}"):
        fetcher(origin.url("/image"))
    assert len(origin.requests) == 1


@pytest.mark.parametrize("kind", ["raw", "gz"])
def test_a_content_that_changed_begins_anew(origin: Origin, fetcher: Fetcher, kind: str) -> None:
    """With fresh hashes, a fresh decompressor, and an empty file."""
    old = random.Random(9).randbytes(5 * MIB) if kind == "raw" else stored("xz")
    resource = origin.put("/image", old, etag='"old"', breaks=[3 * MIB])

    def change(offset: int) -> None:
        if resource.etag == '"old"' and not resource.breaks and offset > 2 * MIB:
            origin.put("/image", stored(kind), etag='"new"')

    resource.at = change
    done = fetcher(origin.url("/image"), checksums={})
    assert done.stored_digests == digests(stored(kind))
    assert done.digests == digests(CONTENT)
    assert fetcher.into.read_bytes() == CONTENT
    assert [each.get("If-Range") for each in origin.asked("/image")] == [None, '"old"']


@pytest.mark.parametrize("etag", [None, 'W/"one"'])
def test_without_a_strong_validator_it_begins_anew(origin: Origin, fetcher: Fetcher, etag: str | None) -> None:
    origin.put("/image", CONTENT, etag=etag, breaks=[3 * MIB])
    fetcher(origin.url("/image"))
    assert origin.served("/image") == 3 * MIB + len(CONTENT)
    assert not [each for each in origin.asked("/image") if "Range" in each]


@pytest.mark.parametrize("fault", ["ignores_range", "wrong_range"])
def test_a_server_that_gives_no_ranges_begins_anew(origin: Origin, fetcher: Fetcher, fault: str) -> None:
    origin.put("/image", CONTENT, breaks=[3 * MIB], **{fault: True})
    fetcher(origin.url("/image"))
    assert fetcher.into.read_bytes() == CONTENT


def test_a_server_that_ignores_the_condition_is_seen_by_its_etag(origin: Origin, fetcher: Fetcher) -> None:
    resource = origin.put("/image", bytes(5 * MIB), breaks=[3 * MIB], etag='"old"', ignores_if_range=True)

    def change(offset: int) -> None:
        if offset > 2 * MIB:
            resource.content, resource.etag, resource.at = CONTENT, '"new"', lambda offset: None

    resource.at = change
    fetcher(origin.url("/image"))
    assert fetcher.into.read_bytes() == CONTENT


def test_a_server_that_promises_more_than_it_has_is_given_up(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", CONTENT, length=len(CONTENT) + 10)
    with pytest.raises(Unreachable, match=r"given up after 3 attempts"):
        fetcher(origin.url("/image"), attempts=3)


def test_a_server_that_promises_less_gives_a_wrong_digest(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", CONTENT, length=MIB)
    with pytest.raises(WrongDigest):
        fetcher(origin.url("/image"))


def test_an_end_that_nobody_announced_is_seen_by_the_digest(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", CONTENT, close_delimited=True)
    fetcher(origin.url("/image"))
    origin.put("/image", CONTENT[:-1], close_delimited=True)
    with pytest.raises(WrongDigest):
        fetcher(origin.url("/image"))


# ---------------------------------------------------------------- more than one location


def test_the_next_location_is_asked_when_one_dies_for_good(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", CONTENT, breaks=[3 * MIB] * 100)
    origin.put("/mirror", stored("zst"))
    done = fetcher(origin.url("/image"), origin.url("/mirror"), attempts=2)
    assert (done.location, done.stored_size) == (origin.url("/mirror"), len(stored("zst")))
    assert fetcher.into.read_bytes() == CONTENT


def test_the_next_location_is_asked_when_bytes_are_wrong(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/rotten", CONTENT[:-1] + b"x" + bytes(3 * MIB))
    origin.put("/good", CONTENT)
    assert fetcher(origin.url("/rotten"), origin.url("/good")).location == origin.url("/good")
    assert fetcher.into.read_bytes() == CONTENT


def test_when_all_fail_each_cause_is_told_without_secrets(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/broken", CONTENT, breaks=[10] * 100)
    with Origin() as other:
        dead = other.url("/image")
    locations = [
        origin.url("/broken?token=s3cret"),
        origin.url("/missing").replace("//", "//user:s3cret@"),
        dead,
        "http://192.168.7.7/image",
        "ftp://127.0.0.1/s3cret",
    ]
    with pytest.raises(Unreachable) as failed:
        fetcher(*locations, attempts=2)
    said = str(failed.value)
    for cause in ("/broken", "/missing: the server answered 404", "refused", "no public address", "only http"):
        assert cause in said
    assert "s3cret" not in said.replace("ftp://127.0.0.1/s3cret", "")


@pytest.mark.parametrize(
    ("location", "kind"), [("http://192.168.7.7/image", AddressRefused), ("file:///etc/passwd", BadUrl)]
)
def test_a_location_that_may_not_be_asked_is_an_error_of_its_own(
    fetcher: Fetcher, location: str, kind: type[ImageError]
) -> None:
    with pytest.raises(kind):
        fetcher(location)
    with pytest.raises(kind):
        fetcher(location, location)


def test_wrong_bytes_are_told_before_silence(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/rotten", b"rotten")
    with pytest.raises(WrongDigest, match="404"):
        fetcher(origin.url("/missing"), origin.url("/rotten"))


def test_without_a_location_nothing_is_reachable(fetcher: Fetcher) -> None:
    with pytest.raises(Unreachable, match="no location is known"):
        fetcher()


# ---------------------------------------------------------------- cancel, and what stands still


class Cancelled(Exception):
    pass


def cancel_at(bytes_done: int, *, after: float = 0.0) -> Callable[[int, int], None]:
    begun = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done >= bytes_done and time.monotonic() - begun >= after:
            raise Cancelled

    return progress


@pytest.mark.parametrize("kind", ["raw", "gz"])
def test_it_is_cancelled_while_bytes_come(origin: Origin, fetcher: Fetcher, kind: str) -> None:
    origin.put("/image", stored(kind), pause=0.01)
    with pytest.raises(Cancelled):
        fetcher(origin.url("/image"), progress=cancel_at(MIB))
    assert origin.served("/image") < len(stored(kind))


def test_it_is_cancelled_while_the_server_is_silent(origin: Origin, fetcher: Fetcher) -> None:
    fetcher.web = Web(["127.0.0.0/8"], read_timeout=600)
    origin.put("/image", CONTENT, at=lambda offset: time.sleep(60 if offset > MIB else 0))
    with pytest.raises(Cancelled):
        fetcher(origin.url("/image"), progress=cancel_at(MIB, after=0.5))


def test_it_is_cancelled_while_it_pauses(origin: Origin, fetcher: Fetcher) -> None:
    origin.put("/image", CONTENT, breaks=[MIB])
    with pytest.raises(Cancelled):
        fetcher(origin.url("/image"), progress=cancel_at(MIB, after=0.5), backoff=600)


def test_a_silent_server_is_left(origin: Origin, fetcher: Fetcher) -> None:
    fetcher.web = Web(["127.0.0.0/8"], read_timeout=0.3)
    origin.put("/image", CONTENT, at=lambda offset: time.sleep(60))
    origin.put("/mirror", CONTENT)
    assert fetcher(origin.url("/image"), origin.url("/mirror"), attempts=2).location == origin.url("/mirror")


@pytest.mark.parametrize("faults", [{}, {"etag": None, "breaks": [MIB] * 1000}], ids=["drips", "begins anew for ever"])
def test_a_server_that_takes_too_long_is_left(
    origin: Origin, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, faults: dict[str, Any]
) -> None:
    """Each connection gets on well enough, and all of it not."""
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    monkeypatch.setattr(module, "LEAST_RATE", 2 * MIB)
    origin.put("/image", CONTENT, pause=0.05, **faults)
    origin.put("/mirror", CONTENT)
    assert fetcher(origin.url("/image"), origin.url("/mirror"), attempts=1000).location == origin.url("/mirror")
    with pytest.raises(Unreachable, match="bytes a second on average"):
        fetcher(origin.url("/image"), attempts=1000)


def test_little_that_becomes_much_is_not_slow(
    origin: Origin, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 4.0)
    monkeypatch.setattr(module, "LEAST_RATE", 2 * MIB)
    zeros = subprocess.run(TOOLS["gz"], input=bytes(400 * MIB), stdout=subprocess.PIPE, check=True).stdout
    origin.put("/image", zeros, piece=len(zeros) // 12, pause=0.5)
    assert fetcher(origin.url("/image"), checksums={}, max_size=500 * MIB).stored_size == len(zeros)


def test_progress_is_that_of_the_bytes_sent(origin: Origin, fetcher: Fetcher) -> None:
    told: list[tuple[int, int]] = []
    origin.put("/image", stored("zst"), pause=0.02)
    fetcher(origin.url("/image"), progress=lambda done, total: told.append((done, total)))
    size = len(stored("zst"))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} <= {0, size}
    assert max(told) == (size, size)


def test_a_decompressor_that_stands_still_is_ended(
    origin: Origin, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would that a stranger's bytes took over."""
    monkeypatch.setattr(streams, "STALL", 1.0)
    monkeypatch.setattr(streams, "SOURCE", "import time; time.sleep(600)")
    origin.put("/image", stored("gz"))
    with pytest.raises(SandboxFailed, match="has not moved"):
        fetcher(origin.url("/image"))


def test_a_decompressor_that_does_not_end_is_ended(
    origin: Origin, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gave all, and stays: the sandbox has its stdout open until all in it have ended."""
    monkeypatch.setattr(streams, "STALL", 1.0)
    source = "import os, time\nwhile os.read(0, 1 << 16): pass\nos.close(1)\ntime.sleep(600)"
    monkeypatch.setattr(streams, "SOURCE", source)
    origin.put("/image", stored("gz"))
    with pytest.raises(SandboxFailed, match="has not moved"):
        fetcher(origin.url("/image"))


@pytest.mark.parametrize(
    "source", ["import os; os.kill(os.getpid(), 9)", "raise SystemExit(0)", "1/0", "while True: 1"]
)
def test_a_decompressor_that_fails_otherwise_is_no_fault_of_the_stream(
    origin: Origin, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(streams, "SOURCE", source)
    monkeypatch.setattr(streams, "CPU", 1)
    monkeypatch.setattr(streams, "SLOWEST", 1 << 40)
    origin.put("/image", stored("gz") * 3)
    with pytest.raises(SandboxFailed):
        fetcher(origin.url("/image"))


def test_a_full_disk_is_told_as_such(origin: Origin, fetcher: Fetcher) -> None:
    """The process may not write that much; the file system says the same in other words."""
    origin.put("/image", stored("gz"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(CacheFull, match="no room"):
            fetcher(origin.url("/image"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_is_there_is_left_alone(origin: Origin, fetcher: Fetcher) -> None:
    fetcher.into.write_text("somebody's")
    with pytest.raises(FileExistsError):
        fetch(fetcher.web, fetcher.sandbox, Wanted((), {}, None, None, 1), fetcher.into, quiet)
    assert fetcher.into.read_text() == "somebody's"
