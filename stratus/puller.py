"""An image on this machine: downloaded once however many ask, resumed where it was cut off, verified, immutable.

DIRECTORY/<sha256>.qcow2     complete and verified, 0444
          .<sha256>.part     what came so far; goes on from there, also after a kill
          .<sha256>.lock     flock(2): who has it downloads, the others wait and find the file; never removed
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockdev.extents import Progress
from blockdev.files import durable_rename
from blockdev.locks import FileLock
from blockdev.transfer import BUFFER, HashedFile, Interrupted, Part, Sink
from blockdev.transfer import download as transfer
from stratus.client import Client
from stratus.content import Content
from stratus.errors import Conflict, Corrupt, Document, Stopped, StratusError

#: Seconds before the second of five tries without a byte; the next ones wait twice as long each time.
BACKOFF = 1.0
_GO_ON = "run it again: it goes on where it was"
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def pull(client: Client, image: Document, directory: Path, progress: Progress = lambda _, __: None) -> Path:
    """The file of `image` in `directory`, downloaded unless it is there; others who want it meanwhile wait.

    `image` is the record, or anything with its `id`, `digest` and `file_size`. `progress(done, total)` in bytes. Raises
    StratusError: Corrupt when the bytes are not those of the digest (then nothing of them is left), and OSError.
    """
    digest = digest_of(image)
    target = directory / f"{digest}.qcow2"
    if target.exists():
        return target
    with FileLock(directory / f".{digest}.lock"):
        if not target.exists():
            part = directory / f".{digest}.part"
            with download(client, image, part, progress):
                os.chmod(part, 0o444)
                durable_rename(part, target)
    return target


def digest_of(image: Document) -> str:
    """The SHA-256 of the image's file. Raises Conflict when it has none yet."""
    digest = image.get("digest")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise Conflict(f"image {image['id']} has no content yet", "see its state with: stratus-describe-images ID")
    return digest


@contextmanager
def download(client: Client, image: Document, part: Path, progress: Progress) -> Iterator[None]:
    """Inside, `part` holds the verified bytes of `image` and nobody else has it; from there it can be renamed.

    What `part` held before is what came so far. Raises Corrupt, Conflict when another process downloads to it,
    StratusError and OSError; it is removed only if its bytes are wrong.
    """
    with _alone(part):
        with HashedFile(part) as file:
            receive(client, image, file, progress)
        if file.hexdigest != digest_of(image):
            part.unlink()
            raise Corrupt(
                f"what came of image {image['id']} is not it: its SHA-256 is {file.hexdigest}, not {digest_of(image)}",
                "it was removed; try again, and tell an admin if it stays so",
            )
        yield


def receive(client: Client, image: Document, sink: Sink, progress: Progress, backoff: float = BACKOFF) -> None:
    """Bring what `sink` lacks of the image's file, over as many connections as that takes. Who asked verifies it.

    Raises StratusError, the last one's when tries brought nothing; Stopped on Ctrl-C.
    """
    total = int(image["file_size"])
    if sink.position > total:
        sink.restart()
    try:
        if sink.position < total:
            opener = _Opener(client, image, total)
            transfer(opener, sink, validator=digest_of(image), progress=progress, backoff=backoff)
    except Interrupted as error:
        raise _told(error) from error
    except KeyboardInterrupt:
        raise Stopped(_GO_ON) from None
    progress(sink.position, total)


class _Opener:
    """Asks the service for an image's bytes. If-Range: what is another content now comes whole (RFC 9110 §13.1.5)."""

    def __init__(self, client: Client, image: Document, total: int) -> None:
        self._client = client
        self._path = f"/v1/images/{image['id']}/content"
        self._digest = digest_of(image)
        self._total = total

    @contextmanager
    def __call__(self, offset: int, validator: str | None) -> Iterator[Part]:
        headers = {"Range": f"bytes={offset}-", "If-Range": f'"{self._digest}"'} if offset else {}
        with _repeatable():
            content = self._client.content(self._path, headers)
        with content:

            def readinto(buffer: memoryview) -> int:
                with _repeatable():
                    return content.readinto(buffer)

            yield Part(readinto, self._begin(content, offset), self._total, self._digest)

    def _begin(self, content: Content, offset: int) -> int:
        """The first byte of the answer. Raises Corrupt if it is none to what was asked."""
        tag = content.headers.get("ETag", f'"{self._digest}"')
        if tag != f'"{self._digest}"':
            raise Corrupt(f"the service has other content for this image now: {tag}, not {self._digest}")
        if content.status == 200:
            begin, length = 0, content.headers.get("Content-Length", self._total)
        elif content.status == 206 and (span := _RANGE.fullmatch(content.headers.get("Content-Range", ""))):
            begin, length = int(span[1]), span[2]
        else:
            raise Corrupt(f"asked for what follows byte {offset}, the service answered with status {content.status}")
        if begin not in (0, offset) or int(length) != self._total:
            raise Corrupt(f"asked for bytes from {offset} of {self._total}, the service sends from {begin} of {length}")
        return begin


@contextmanager
def _repeatable() -> Iterator[None]:
    try:
        yield
    except StratusError as error:
        if error.retry_after is None:
            raise
        raise Interrupted(str(error)) from error


def _told(interrupted: Interrupted) -> StratusError:
    """For a user: what broke the connection, and that nothing is lost."""
    cause = interrupted.__cause__
    error = cause if isinstance(cause, StratusError) else StratusError(str(interrupted))
    error.hint = f"{error.hint}; {_GO_ON}" if error.hint else _GO_ON
    return error


class Digests:
    """A sink that keeps no bytes, only their number and digests by `algorithms`."""

    def __init__(self, *algorithms: str) -> None:
        self._algorithms = algorithms
        self._buffer = memoryview(bytearray(BUFFER))
        self.restart()

    def buffer(self) -> memoryview:
        """The same one, always."""
        return self._buffer

    def push(self, size: int) -> None:
        """Add them to each digest."""
        for each in self._sums.values():
            each.update(self._buffer[:size])
        self.position += size

    def restart(self) -> None:
        """As new."""
        self.position = 0
        self._sums = {name: hashlib.new(name, usedforsecurity=name != "sha1") for name in self._algorithms}

    @property
    def digests(self) -> dict[str, str]:
        """In hexadecimal, by algorithm."""
        return {name: each.hexdigest() for name, each in self._sums.items()}


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """`part` exists and is ours alone. Raises Conflict when it is another's."""
    lock = FileLock(part)
    if not lock.try_lock():
        raise Conflict(f"{part} is being written by another download")
    try:
        # Who had it may have renamed it between our open and our lock: then it is no part any more.
        if not part.exists() or not os.path.samestat(os.fstat(lock.fd), part.stat()):
            raise Conflict(f"{part} was finished by another download just now")
        yield
    finally:
        lock.release()
