"""A file, sent to the service piece by piece: what was cut off goes on at the byte the service has."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO

from stratus.client import Client
from stratus.errors import Conflict, Document, Problem, Stopped, StratusError, TimedOut

#: Bytes sent at a time, and so what a broken connection loses at most.
PIECE = 8 << 20
#: Seconds before each further try that gets nothing across; one that does starts over.
PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

Progress = Callable[[int, int], None]


def send(
    client: Client,
    image: str,
    file: IO[bytes],
    size: int,
    progress: Progress,
    pauses: tuple[float, ...] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> Document:
    """Send what the service lacks of the `size` bytes of `file`; the operation that makes an image of them.

    Raises StratusError, with a hint of how to go on; Conflict when the upload was for a file of another size.
    """
    go_on = f"go on with: stratus-upload-image FILE --resume {image}"
    try:
        return _send(client, f"/v1/images/{image}/upload", file, size, progress, pauses, sleep)
    except KeyboardInterrupt:
        raise Stopped(go_on) from None
    except StratusError as error:
        error.hint = f"{error.hint}; {go_on}" if error.hint else go_on
        raise


def _send(
    client: Client,
    path: str,
    file: IO[bytes],
    size: int,
    progress: Progress,
    pauses: tuple[float, ...],
    sleep: Callable[[float], None],
) -> Document:
    offset, left = _received(client, path, size), list(pauses)
    while True:
        progress(offset, size)
        before = offset
        try:
            operation, offset = _piece(client, path, file, offset, size)
            if operation is not None:
                return operation
        except StratusError as error:
            if not _passes(error) or not left:
                raise
            sleep(max(left.pop(0), error.retry_after or 0))
            offset = _received(client, path, size)
        if offset > before:
            left = list(pauses)


def _piece(client: Client, path: str, file: IO[bytes], offset: int, size: int) -> tuple[Document | None, int]:
    """The operation, once all was received, and how much the service has."""
    if offset == size:
        return _under_way(client, path), offset
    file.seek(offset)
    piece = file.read(min(PIECE, size - offset))
    if not piece:
        raise Conflict("the file became shorter while it was sent")
    end = offset + len(piece)
    answer = client.put(path, piece, {"Content-Range": f"bytes {offset}-{end - 1}/{size}"})
    return answer.operation, end


def _under_way(client: Client, path: str) -> Document:
    """What became of the upload, when the answer to its last piece was lost."""
    image = path.split("/")[3]
    found = client.get("/v1/operations", {"resource": image})["items"]
    commits = [each for each in found if each["kind"] == "image.commit"]
    if not commits:
        raise Conflict("the service has all of it and does nothing with it", "tell an admin")
    return dict(commits[0])


def _received(client: Client, path: str, size: int) -> int:
    """Bytes the service has, all of them when it has begun to make an image of them."""
    try:
        upload = client.get(path)
    except Problem as problem:
        if problem.status != 409:
            raise
        return size
    if upload["size"] != size:
        raise Conflict(f"that upload is for a file of {upload['size']} bytes; this one has {size}")
    return int(upload["received"])


def _passes(error: StratusError) -> bool:
    """Whether to look what arrived and go on: no connection, no answer in time, a piece that does not follow, or
    of which the service got only a part."""
    if isinstance(error, Problem):
        return error.retry_after is not None or error.status in (400, 408, 409, 416)
    return isinstance(error, TimedOut) or error.retry_after is not None
