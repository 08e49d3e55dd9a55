"""The loop that resumes, against a source that breaks, changes and lies as hypothesis likes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev.transfer import LEAST_GAIN, HashedFile, Interrupted, Part, download

MIB = 1 << 20


def quiet(done: int, total: int) -> None:
    pass


@dataclass
class Attempt:
    """What the source does when it is asked once more: it breaks off after `gives` bytes (None: it does not), does not
    answer at all, has another content by now, or sends all although a part was asked for."""

    gives: int | None = None
    refuses: bool = False
    changes: bool = False
    ignores_offset: bool = False
    tells_size: bool = True
    has_validator: bool = True
    pieces: int = 1 << 16


@dataclass
class Source:
    """One content after another, all alike but for their bytes, as the attempts go; well when none is left."""

    size: int
    attempts: list[Attempt]
    number: int = 0
    opened: int = 0
    sent: int = 0
    asked: list[int] = field(default_factory=list)

    @property
    def content(self) -> bytes:
        return bytes((self.number + at) % 251 for at in range(self.size))

    @contextmanager
    def open(self, offset: int, validator: str | None) -> Iterator[Part]:
        self.opened += 1
        self.asked.append(offset)
        attempt = self.attempts.pop(0) if self.attempts else Attempt()
        self.number += attempt.changes
        if attempt.refuses:
            raise Interrupted("refused")
        resumes = validator == str(self.number) and not attempt.ignores_offset
        start = offset if resumes else 0
        yield Part(
            self._reader(attempt, start),
            start,
            self.size if attempt.tells_size else None,
            str(self.number) if attempt.has_validator else None,
        )

    def _reader(self, attempt: Attempt, at: int):  # type: ignore[no-untyped-def]
        left = self.content[at:]
        allowed = len(left) if attempt.gives is None else attempt.gives

        def readinto(buffer: memoryview) -> int:
            nonlocal left, allowed
            if left and not allowed:
                raise Interrupted("broke off")
            piece = left[: min(len(buffer), allowed, attempt.pieces)]
            buffer[: len(piece)] = piece
            left, allowed = left[len(piece) :], allowed - len(piece)
            self.sent += len(piece)
            return len(piece)

        return readinto


class Memory:
    """A sink whose buffers are small and of changing length."""

    def __init__(self, sizes: list[int]) -> None:
        self.taken = bytearray()
        self._sizes = sizes
        self._turn = 0
        self._buffer = memoryview(b"")
        self._pushed = True

    @property
    def position(self) -> int:
        return len(self.taken)

    def buffer(self) -> memoryview:
        if self._pushed:
            self._buffer = memoryview(bytearray(self._sizes[self._turn % len(self._sizes)]))
            self._turn += 1
            self._pushed = False
        return self._buffer

    def push(self, size: int) -> None:
        self.taken += self._buffer[:size]
        self._pushed = True

    def restart(self) -> None:
        self.taken.clear()


attempts = st.builds(
    Attempt,
    gives=st.none() | st.integers(0, 400),
    refuses=st.booleans(),
    changes=st.booleans(),
    ignores_offset=st.booleans(),
    has_validator=st.booleans(),
    pieces=st.integers(1, 50),
)
buffers = st.lists(st.integers(1, 90), min_size=1, max_size=5)


@given(st.integers(0, 300), st.lists(attempts, max_size=8), buffers)
def test_what_arrives_is_one_content_whole(size: int, faults: list[Attempt], sizes: list[int]) -> None:
    source, sink = Source(size, faults), Memory(sizes)
    assert download(source.open, sink, progress=quiet, attempts=9, backoff=0) == size
    assert bytes(sink.taken) == source.content


@given(st.integers(1, 300), st.lists(st.integers(1, 100), max_size=8), buffers)
def test_what_was_sent_is_not_sent_again(size: int, breaks: list[int], sizes: list[int]) -> None:
    source, sink = Source(size, [Attempt(gives=gives) for gives in breaks]), Memory(sizes)
    download(source.open, sink, progress=quiet, attempts=9, backoff=0)
    assert bytes(sink.taken) == source.content
    assert source.sent == size


@given(st.integers(1, 5), st.integers(0, 99))
def test_a_source_that_never_gets_on_is_given_up(tries: int, gives: int) -> None:
    """Also one that gives nearly all, but from the beginning each time."""
    source = Source(100, [Attempt(gives=gives, has_validator=False) for _ in range(50)])
    with pytest.raises(Interrupted, match="broke off"):
        download(source.open, Memory([64]), progress=quiet, attempts=tries, backoff=0)
    assert source.opened == tries


@pytest.mark.parametrize(("gives", "arrives"), [(LEAST_GAIN, True), (LEAST_GAIN - 1, False)])
def test_attempts_that_bring_enough_do_not_count(gives: int, arrives: bool) -> None:
    content = bytes(5 * LEAST_GAIN)
    sink = Memory([MIB])

    @contextmanager
    def opener(offset: int, validator: str | None) -> Iterator[Part]:
        left = gives

        def readinto(buffer: memoryview) -> int:
            nonlocal left
            if not left:
                raise Interrupted("broke off")
            got = min(len(buffer), left)
            left -= got
            return got

        yield Part(readinto, offset, len(content), "one")

    def bring() -> int:
        return download(opener, sink, progress=quiet, attempts=2, backoff=0)

    if arrives:
        assert bring() == len(content)
    else:
        with pytest.raises(Interrupted):
            bring()


@given(st.integers(1, 100), st.integers(0, 100))
def test_bytes_that_a_sink_has_already_are_not_asked_for(size: int, has: int) -> None:
    source, sink = Source(size, []), Memory([17])
    sink.taken += source.content[: min(has, size)]
    download(source.open, sink, validator="0", progress=quiet)
    assert bytes(sink.taken) == source.content
    assert source.asked == [min(has, size)]


def test_a_content_of_unknown_size_ends_where_it_ends() -> None:
    source, sink = Source(100, [Attempt(gives=30, tells_size=False), Attempt(tells_size=False)]), Memory([64])
    assert download(source.open, sink, progress=quiet, backoff=0) == 100
    assert (bytes(sink.taken), source.asked) == (source.content, [0, 30])


def test_an_end_before_the_end_is_an_interruption() -> None:
    @contextmanager
    def opener(offset: int, validator: str | None) -> Iterator[Part]:
        yield Part(lambda buffer: 0, offset, 10, "one")

    with pytest.raises(Interrupted, match="ended after 0 of 10 bytes"):
        download(opener, Memory([64]), progress=quiet, attempts=2, backoff=0)


def test_a_size_that_changes_under_the_same_validator_begins_anew() -> None:
    asked = []

    @contextmanager
    def opener(offset: int, validator: str | None) -> Iterator[Part]:
        asked.append((offset, validator))
        source = Source(20 if len(asked) == 1 else 30, [Attempt(gives=10)] if len(asked) == 1 else [])
        with source.open(offset, validator) as part:
            yield part

    sink = Memory([7])
    assert download(opener, sink, progress=quiet, backoff=0) == 30
    assert asked == [(0, None), (10, "0"), (0, None)]
    assert bytes(sink.taken) == Source(30, []).content


def test_an_opener_that_answers_something_else_is_wrong() -> None:
    @contextmanager
    def opener(offset: int, validator: str | None) -> Iterator[Part]:
        yield Part(lambda buffer: 0, 5, 10, "one")

    with pytest.raises(ValueError, match="the bytes from 5"):
        download(opener, Memory([64]), progress=quiet)


class Cancelled(Exception):
    pass


def test_progress_is_told_and_ends_a_pause() -> None:
    told = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise Cancelled

    source = Source(100, [Attempt(gives=40)] + [Attempt(refuses=True)] * 9)
    with pytest.raises(Cancelled):
        download(source.open, Memory([64]), progress=progress, backoff=3600)
    assert told == [(0, 100), (40, 100), (40, 100)]


@given(st.binary(max_size=200), st.integers(0, 200), st.booleans())
def test_a_file_that_was_left_is_hashed_and_continued(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, has: int, changed: bool
) -> None:
    path = tmp_path_factory.mktemp("file") / "part"
    path.write_bytes(content[:has] if not changed else b"x" * has)
    with HashedFile(path) as sink:
        assert sink.position == path.stat().st_size
        if changed:
            sink.restart()
        rest = content[sink.position :]
        sink.buffer()[: len(rest)] = rest
        sink.push(len(rest))
        sink.sync()
        assert (sink.position, sink.hexdigest) == (len(content), hashlib.sha256(content).hexdigest())
    assert path.read_bytes() == content


def test_a_hashed_file_is_a_sink(tmp_path: Path) -> None:
    source = Source(5000, [Attempt(gives=1000), Attempt(gives=700, changes=True)])
    with HashedFile(tmp_path / "file", "sha1") as sink:
        download(source.open, sink, progress=quiet, backoff=0)
        assert sink.hexdigest == hashlib.sha1(source.content).hexdigest()
    assert (tmp_path / "file").read_bytes() == source.content
