"""Uploads: the bytes of an image, sent piece by piece, each written behind the last.

    <home>/uploads/<image's id>.part    0600; who writes to it holds flock(2) on it

How much of it counts is in the image's row, which is told of a piece only after the piece is on the disk: what lies
beyond is of a piece that did not come to its end, and is written over. The last piece makes the row `fetching`, and
the worker's is all the rest. A part whose image is neither `receiving` nor `fetching` is nobody's, and swept away.

Parts lie under the home, as the database may, so no piece is begun or goes on that would leave less than
`images.reserve` free there.
"""

from __future__ import annotations

import datetime as dt
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import capacity, holds, images, operations
from app.auth import Caller, require_owner
from app.config import Settings
from app.db import Database, change
from app.errors import Problem, conflict
from app.events import SYSTEM, record
from app.models import Image, Operation
from app.states import now, transition
from app.transfers import Read
from blockdev.files import durable_unlink, fsync_dir
from blockdev.locks import try_flock

#: Bytes of a piece at most: what a broken connection loses, and what is on the way to the disk when it is waited for.
PIECE = 64 << 20
#: Bytes that are read at a time; of one that stands still within these, those before it are kept.
CHUNK = 256 << 10
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Piece:
    """Bytes `first` to `last`, both counted, of `total`."""

    first: int
    last: int
    total: int

    @property
    def size(self) -> int:
        return self.last + 1 - self.first


def part(settings: Settings, image_id: UUID) -> Path:
    return settings.upload_dir / f"{image_id}.part"


def size_of(image: Image) -> int:
    """Bytes the upload has in all."""
    return int((image.upload or {})["size"])


def find(session: Session, caller: Caller, identifier: UUID) -> Image:
    """The image if the caller sends it, and it is not here in full yet; Problem 404, 403 or 409 otherwise."""
    image = images.find(session, caller, identifier)
    require_owner(caller, image)
    if image.state != "receiving":
        raise not_receiving(image)
    return image


def not_receiving(image: Image) -> Problem:
    return conflict("image-not-receiving", f"Image {image.id} is {image.state}: nothing of it is to be sent.")


# ---------------------------------------------------------------- a piece


def receive(
    database: Database, settings: Settings, caller: Caller, image_id: UUID, piece: Piece, read: Read
) -> tuple[Image, Operation | None]:
    """Take the piece; the image as it is now, and the operation that makes it one if that was the last.

    Problem when the piece is not the next one, somebody else is sending it, or there is no room for it. What did come
    of one that broke off is kept.
    """
    with _writing(part(settings, image_id)) as fd:
        with database.read() as session:
            image = find(session, caller, image_id)
        if piece.first != image.received:
            raise out_of_order(image.received)
        capacity.require_free(settings, piece.size)
        came, trouble = _write(settings, fd, piece, read)
        os.fdatasync(fd)
        with database.write() as session:
            outcome = _count(session, caller, image, came)
    if trouble is not None:
        raise trouble
    return outcome


def out_of_order(received: int) -> Problem:
    detail = f"{received} bytes are here: the next piece begins there."
    return Problem(409, "upload-out-of-order", detail, headers={"Upload-Offset": str(received)})


@contextmanager
def _writing(path: Path) -> Iterator[int]:
    """The part, alone; made if need be, its name on the disk. Problem 409 while somebody else writes to it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if not try_flock(fd):
            detail = "Another piece of this image is being received; ask what is here when it has ended."
            raise Problem(409, "upload-busy", detail, headers={"Retry-After": "1"})
        if os.fstat(fd).st_size == 0:
            fsync_dir(path.parent)
        yield fd
    finally:
        os.close(fd)


def _write(settings: Settings, fd: int, piece: Piece, read: Read) -> tuple[int, Problem | None]:
    """How many bytes of the piece were written, and why not all."""
    came = 0
    while came < piece.size:
        try:
            data = read(min(CHUNK, piece.size - came))
        except OSError as error:
            return came, _broken_off(error)
        if not data:
            return came, _broken_off(None)
        try:
            capacity.require_free(settings, len(data))
            _write_all(fd, data, piece.first + came)
        except Problem as problem:
            return came, problem
        except OSError as error:
            if error.errno in _FULL:
                return came, capacity.no_room(len(data))
            raise
        came += len(data)
    return came, None


def _broken_off(error: OSError | None) -> Problem:
    if isinstance(error, TimeoutError):
        return Problem(408, "upload-too-slow", "The piece stood still for too long; send the rest of it anew.")
    return Problem(400, "upload-broken-off", "The piece ended before its end.")


def _write_all(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def _count(session: Session, caller: Caller, image: Image, came: int) -> tuple[Image, Operation | None]:
    """Write down that `came` bytes more are here; with the last of them, what is to be done with them."""
    received = image.received + came
    unchanged = (Image.id == image.id, Image.state == "receiving", Image.received == image.received)
    told = update(Image).where(*unchanged).values(received=received, updated_at=now())
    if change(session, told) == 0:
        raise not_receiving(session.get(Image, image.id) or image)
    operation = None
    if received == size_of(image):
        operation = _commit(session, caller, image)
    return session.get_one(Image, image.id, populate_existing=True), operation


def _commit(session: Session, caller: Caller, image: Image) -> Operation:
    transition(session, Image, image.id, "fetching", only_from=("receiving",))
    record(session, caller.actor, "image.uploaded", ("image", image.id), size=size_of(image))
    operation = operations.enqueue(session, "image.commit", caller, image.id, ("image", image.id))
    operations.watch(session, operation, caller)
    return operation


# ---------------------------------------------------------------- the end of uploads


def expire(database: Database, settings: Settings) -> list[UUID]:
    """Begin to delete what nobody has sent a piece of for `images.upload_expiry`, unless one is on its way."""
    before = now() - dt.timedelta(seconds=settings.images.upload_expiry)
    abandoned = (Image.state == "receiving", Image.updated_at < before)
    with database.read() as session:
        found = session.scalars(select(Image.id).where(*abandoned)).all()
    quiet = [image_id for image_id in found if not _is_being_written(part(settings, image_id))]
    for image_id in quiet:
        with database.write() as session:
            if holds.take_away(session, image_id, *abandoned):
                record(session, SYSTEM, "image.upload-expired", ("image", image_id))
                operations.enqueue(session, "image.delete", None, image_id, ("image", image_id))
    return quiet


def _is_being_written(path: Path) -> bool:
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return not try_flock(fd)
        finally:
            os.close(fd)
    return False


def sweep(database: Database, settings: Settings) -> list[Path]:
    """Remove the parts that are nobody's; those that are were written down before they were made."""
    parts = {path.stem: path for path in settings.upload_dir.glob("*.part")}
    if not parts:
        return []
    with database.read() as session:
        living = select(Image.id).where(Image.state.in_(("receiving", "fetching")), Image.origin_kind == "upload")
        wanted = {str(image_id) for image_id in session.scalars(living)}
    gone = [path for name, path in parts.items() if name not in wanted]
    for path in gone:
        durable_unlink(path)
    return gone
