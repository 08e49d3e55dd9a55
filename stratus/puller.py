"""An image on this machine: downloaded once however many ask, resumed where it was cut off, verified, immutable.

DIRECTORY/<sha256>.qcow2     complete and verified, 0444
          .<sha256>.part     what came so far; goes on from there, also after a kill
          .<sha256>.lock     flock(2): who has it downloads, the others wait and find the file; never removed
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from blockdev.files import durable_rename
from blockdev.locks import FileLock, try_flock
from stratus.client import Client
from stratus.content import Content
from stratus.errors import Conflict, Corrupt, Document, Stopped, StratusError

CHUNK = 1 << 20
#: Seconds before each further try that gets no byte; one that gets some starts over.
PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_GO_ON = "run it again: it goes on where it was"
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)

Progress = Callable[[int, int], None]


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
    with _open_part(part) as file:
        came = _File(file)
        receive(client, image, came, progress)
        if came.digest != digest_of(image):
            part.unlink()
            raise Corrupt(
                f"what came of image {image['id']} is not it: its SHA-256 is {came.digest}, not {digest_of(image)}",
                "it was removed; try again, and tell an admin if it stays so",
            )
        yield


class Sink(Protocol):
    """Where bytes go, in order."""

    @property
    def size(self) -> int:
        """How many came so far."""

    def append(self, chunk: memoryview) -> None: ...

    def restart(self) -> None:
        """Forget what came so far."""


def receive(
    client: Client,
    image: Document,
    sink: Sink,
    progress: Progress,
    pauses: tuple[float, ...] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Bring what `sink` lacks of the image's file, over as many connections as that takes. Who asked verifies it.

    Raises StratusError: the last one's, when `pauses` are used up without a byte; Stopped on Ctrl-C.
    """
    left = list(pauses)
    try:
        while True:
            before = sink.size
            try:
                return _receive(client, image, sink, progress)
            except StratusError as error:
                if error.retry_after is None:
                    raise
                left = left if sink.size == before else list(pauses)
                if not left:
                    error.hint = f"{error.hint}; {_GO_ON}" if error.hint else _GO_ON
                    raise
                sleep(max(left.pop(0), error.retry_after))
    except KeyboardInterrupt:
        raise Stopped(_GO_ON) from None


def _receive(client: Client, image: Document, sink: Sink, progress: Progress) -> None:
    """One connection's worth. If-Range: what is no longer the same file comes whole (RFC 9110 §13.1.5)."""
    total = int(image["file_size"])
    if sink.size > total:
        sink.restart()
    if sink.size == total:
        return
    validator = f'"{digest_of(image)}"'
    headers = {"Range": f"bytes={sink.size}-", "If-Range": validator} if sink.size else {}
    with client.content(f"/v1/images/{image['id']}/content", headers) as content:
        _begin(content, sink, validator, total)
        buffer = memoryview(bytearray(CHUNK))
        while count := content.readinto(buffer):
            if sink.size + count > total:
                raise Corrupt(f"more than the {total} bytes of image {image['id']} came")
            sink.append(buffer[:count])
            progress(sink.size, total)
    if sink.size < total:
        raise Corrupt(f"{sink.size} of the {total} bytes of image {image['id']} came", _GO_ON)


def _begin(content: Content, sink: Sink, validator: str, total: int) -> None:
    """Hold the answer's head against what was asked for."""
    tag = content.headers.get("ETag", validator)
    if tag != validator:
        raise Corrupt(f"the service has other content for this image now: {tag}, not {validator}")
    if content.status == 200:
        sink.restart()
        return
    match = _RANGE.fullmatch(content.headers.get("Content-Range", ""))
    if content.status != 206 or match is None or match.groups() != (str(sink.size), str(total)):
        raise Corrupt(f"asked for what follows byte {sink.size}, the service answered something else")


class _File:
    """A file that holds what came so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0
        while chunk := file.read(CHUNK):
            self._count(memoryview(chunk))

    @property
    def digest(self) -> str:
        """The SHA-256 of all of it, in hexadecimal."""
        return self._sha256.hexdigest()

    def append(self, chunk: memoryview) -> None:
        """Write it all, whatever write(2) takes at a time."""
        rest = chunk
        while rest:
            rest = rest[self._file.write(rest) :]
        self._count(chunk)

    def restart(self) -> None:
        """Empty the file."""
        self._file.seek(0)
        self._file.truncate()
        self._sha256, self.size = hashlib.sha256(), 0

    def _count(self, chunk: memoryview) -> None:
        self._sha256.update(chunk)
        self.size += len(chunk)


class Digests:
    """Keeps no bytes, only their number and digests by `algorithms`."""

    def __init__(self, *algorithms: str) -> None:
        self._algorithms = algorithms
        self.restart()

    def append(self, chunk: memoryview) -> None:
        """Add it to each."""
        for each in self._sums.values():
            each.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        """As new."""
        self.size = 0
        self._sums = {name: hashlib.new(name, usedforsecurity=name != "sha1") for name in self._algorithms}

    @property
    def digests(self) -> dict[str, str]:
        """In hexadecimal, by algorithm."""
        return {name: each.hexdigest() for name, each in self._sums.items()}


@contextmanager
def _open_part(path: Path) -> Iterator[IO[bytes]]:
    """`path`, made if missing, and ours alone. Raises Conflict when it is another's."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(fd, "r+b", buffering=0) as file:
        # Who had it may have renamed it between our open and our lock: then it is no part any more.
        if not try_flock(fd) or not path.exists() or not os.path.samestat(os.fstat(fd), path.stat()):
            raise Conflict(f"{path} is being written by another download")
        yield file
