"""An image's bytes from the first of its locations that has them, verified on the way: one pass, nothing read twice."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from blockdev.extents import Progress
from blockdev.transfer import Interrupted, Part, download
from imagecache.addresses import shown
from imagecache.entries import ALGORITHMS, Fetched
from imagecache.errors import (
    BadCompression,
    CacheFull,
    ImageError,
    TooLarge,
    Truncated,
    Unreachable,
    WrongDigest,
    WrongSize,
)
from imagecache.sandbox import Sandbox
from imagecache.streams import Arrived, Pipeline
from imagecache.web import Response, Web

#: Answers after which the same location is asked again (RFC 9110, RFC 6585); any other 4xx is final.
_PASSING = {408, 425, 429}
#: What is wrong with bytes that came: told rather than that another location did not answer.
_WRONG = (WrongDigest, WrongSize, BadCompression, Truncated, TooLarge)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PATIENCE = 600.0
LEAST_RATE = 256 << 10
"""After PATIENCE seconds, bytes a second that a location must have brought on average of all further ones, as they are
sent or as they are kept: so none is waited for longer than PATIENCE and what the largest image may take at that rate,
whatever it does meanwhile. (That it is not silent in between is the business of web.py.)"""


@dataclass(frozen=True)
class Wanted:
    """What is to be fetched. `locations` are tried in order. `checksums` maps names of ALGORITHMS to hex digits: none
    may be wrong, and all are those of the stream as it is sent, or of what is kept of it (decompressed); `size` (bytes)
    belongs to the same one. Without checksums nothing is verified but the size, if there is one: the caller
    judges what was fetched. `compression` None: whatever the first bytes say. Neither stream exceeds `max_size`. `also`
    are ALGORITHMS to compute for the caller, beside those of `checksums`."""

    locations: Sequence[str]
    checksums: Mapping[str, str]
    size: int | None
    compression: str | None
    max_size: int
    also: Collection[str] = ()

    @property
    def strongest(self) -> str | None:
        return next((name for name in ALGORITHMS if name in self.checksums), None)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """All, when the digest is to be looked up; otherwise what was said, of which nothing may be wrong (a list of
        what is allowed may name any), and SHA-256 to know it by."""
        if self.strongest is None:
            return ALGORITHMS
        return tuple(name for name in ALGORITHMS if name in {*self.checksums, *self.also, "sha256"})


def fetch(
    web: Web,
    sandbox: Sandbox,
    wanted: Wanted,
    into: Path,
    progress: Progress,
    *,
    attempts: int = 5,
    backoff: float = 1.0,
    durable: bool = True,
) -> Fetched:
    """Make the file `into`, decompressed and durable (its name is its directory's); it is gone after any failure.
    Not `durable`: for one who makes another of it at once, and would not believe it after a crash.

    Everybody may read it, since the sandbox must: its directory is to be closed. Blocks of zeros are holes.

    Each location is asked `attempts` times in a row without getting on, `backoff` seconds and ever longer apart, and
    resumed where it broke off if it says by a strong ETag that its content is the same; it is given up when it is
    slower than LEAST_RATE, or brings more than `wanted.size`. `progress(done, total)` counts bytes as they are sent
    (total 0: not known), is called several times a second whatever we wait for, and may raise to cancel.

    With one location its own error is raised. With several that all failed, each one's cause is told: as WrongDigest,
    WrongSize, BadCompression, Truncated or TooLarge if bytes came and were wrong, as the error that all have in
    common, or as Unreachable. Raises CacheFull, and what `progress` raises.
    """
    if wanted.size is not None and wanted.size > wanted.max_size:
        raise TooLarge(f"it has {wanted.size} bytes, more than the {wanted.max_size} that are allowed")
    job = _Job(web, sandbox, wanted, progress, attempts, backoff, durable)
    with _new_file(into) as fd:
        return job.run(fd)


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o644)  # whatever the umask
        yield fd
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise CacheFull(f"no room for the image: {error.strerror}") from error
        raise
    finally:
        os.close(fd)


class _TooSlow(Exception):
    """Nothing that asking again would change."""


class _Job:
    def __init__(
        self,
        web: Web,
        sandbox: Sandbox,
        wanted: Wanted,
        progress: Progress,
        attempts: int,
        backoff: float,
        durable: bool,
    ) -> None:
        self._web = web
        self._sandbox = sandbox
        self._wanted = wanted
        self._progress = progress
        self._attempts = attempts
        self._backoff = backoff
        self._durable = durable
        self._told = (0, 0)

    def run(self, fd: int) -> Fetched:
        causes: list[ImageError] = []
        for location in self._wanted.locations:
            try:
                return self._from(location, fd)
            except ImageError as error:
                causes.append(_at(location, error))
                os.ftruncate(fd, 0)
        raise _verdict(causes)

    def _from(self, location: str, fd: int) -> Fetched:
        self._began = time.monotonic()
        with Pipeline(
            fd,
            self._sandbox,
            algorithms=self._wanted.algorithms,
            compression=self._wanted.compression,
            limit=self._wanted.max_size,
            look=self._look,
            durable=self._durable,
        ) as self._pipeline:
            try:
                download(
                    lambda offset, validator: self._opened(location, offset, validator),
                    self._pipeline,
                    progress=lambda done, total: self._look(),
                    attempts=self._attempts,
                    backoff=self._backoff,
                )
            except _TooSlow as error:
                raise Unreachable(str(error)) from None
            except Interrupted as error:
                raise Unreachable(f"{error}; given up after {self._attempts} attempts that brought nothing") from error
            return verified(self._wanted, location, self._pipeline.finish())

    def _look(self) -> None:
        self._progress(*self._told)
        sent, kept = self._pipeline.sizes
        if self._wanted.size is not None and min(sent, kept) > self._wanted.size:
            raise WrongSize(f"it has more than the {self._wanted.size} bytes that it should have")
        if max(self._told[0], kept) < LEAST_RATE * (time.monotonic() - self._began - PATIENCE):
            raise _TooSlow(f"given up: fewer than {LEAST_RATE} bytes a second on average")

    @contextmanager
    def _opened(self, location: str, offset: int, validator: str | None) -> Iterator[Part]:
        """An opener of blockdev.transfer: RFC 9110, 13.1.5 (If-Range) and 14.4 (Content-Range)."""
        headers = {"Range": f"bytes={offset}-", "If-Range": validator} if offset and validator else {}
        with _interrupted(), self._web.open(location, headers, allowed={416}, check=self._look) as response:
            part = _part(response, offset, validator)
            if part is not None:
                yield self._counted(part)
                return
        with self._opened(location, 0, None) as whole:  # it cannot give the part that we asked for
            yield whole

    def _counted(self, part: Part) -> Part:
        """The same, of a size that is allowed; what has come of it is told as progress, in a silence too."""
        if part.size is not None and part.size > self._wanted.max_size:
            raise TooLarge(f"{part.size} bytes, more than the {self._wanted.max_size} that are allowed")
        self._told = (part.offset, part.size or 0)

        def readinto(buffer: memoryview) -> int:
            got = part.readinto(buffer)
            self._told = (self._told[0] + got, self._told[1])
            return got

        return replace(part, readinto=readinto)


@contextmanager
def _interrupted() -> Iterator[None]:
    """A failure that may pass is an interruption to blockdev.transfer."""
    try:
        yield
    except Unreachable as error:
        if error.status is not None and error.status < 500 and error.status not in _PASSING:
            raise
        raise Interrupted(str(error)) from error


def _part(response: Response, offset: int, validator: str | None) -> Part | None:
    """What the answer has; None for one that does not fit a range that was asked for."""
    etag = response.headers.get("ETag", "")
    strong = etag if etag.startswith('"') else None
    if response.status == 200:
        return Part(response.readinto, 0, response.length, strong)
    if offset == 0:
        raise Unreachable(f"the server answered {response.status} to a plain request", response.status)
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if response.status != 206 or told is None or int(told[1]) != offset or strong != validator:
        return None
    return Part(response.readinto, offset, None if told[2] == "*" else int(told[2]), strong)


def verified(wanted: Wanted, location: str, arrived: Arrived) -> Fetched:
    """What arrived, if it is what is wanted. Raises WrongDigest, WrongSize."""
    streams = [(arrived.stored_digests, arrived.stored_size), (arrived.digests, arrived.size)]
    for name in filter(wanted.checksums.__contains__, ALGORITHMS):
        good = [each for each in streams if each[0][name] == wanted.checksums[name]]
        if not good:
            got = " or ".join(dict.fromkeys(digests[name] for digests, _ in streams))
            raise WrongDigest(f"its {name} is {got}, not {wanted.checksums[name]}")
        streams = good
    sizes = [size for _, size in streams]
    if wanted.size is not None and wanted.size not in sizes:
        raise WrongSize(f"it has {' or '.join(map(str, dict.fromkeys(sizes)))} bytes, not {wanted.size}")
    return Fetched(location, arrived.stored_digests, arrived.digests, arrived.stored_size, arrived.size)


def _at(location: str, error: ImageError) -> ImageError:
    """The same error, which says where it happened."""
    place = shown(location)
    return error if place in str(error) else type(error)(f"{place}: {error}")


def _verdict(causes: Sequence[ImageError]) -> ImageError:
    """What to raise for the errors of all locations."""
    if not causes:
        return Unreachable("no location is known")
    if len(causes) == 1:
        return causes[0]
    kinds: set[Callable[[str], ImageError]] = {type(error) for error in causes}
    wrong = next((type(error) for error in causes if isinstance(error, _WRONG)), None)
    kind = wrong or (kinds.pop() if len(kinds) == 1 else Unreachable)
    return kind("; ".join(map(str, causes)))
