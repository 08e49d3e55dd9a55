"""Bytes on their way, in or out: how many transfers there are at once, and how slow a client may be.

Each occupies a thread of its process for as long as the client likes, and the threads answer everything else as well.
So a process has few places for transfers, of which nobody has more than half; a client that stands still is cut off
after `idle` seconds, and one that crawls when it has had the time that LEAST_RATE gives it.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO
from uuid import UUID

from gunicorn.http.errors import ParseException

from app.errors import Problem

#: Bytes per second. Who is slower than half a megabit may come back for the rest.
LEAST_RATE = 64 << 10
#: Seconds that the rest of a body which is refused is waited for, so that the client gets to read why.
PATIENCE = 1.0
RETRY_AFTER = "5"
_SWALLOW = 64 << 10

Read = Callable[[int], bytes]


class Places:
    """The transfers of one kind that this process serves: `total` at once, half of them to the same principal."""

    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._share = max(1, total // 2)
        self._held: Counter[UUID] = Counter()
        self._lock = threading.Lock()

    def take(self, principal: UUID) -> None:
        """Problem 503 when there is none; to be given back otherwise."""
        with self._lock:
            if self._held.total() < self._total and self._held[principal] < self._share:
                self._held[principal] += 1
                return
        detail = "As many transfers as this service has room for are under way; come again in a moment."
        raise Problem(503, "transfers-busy", detail, headers={"Retry-After": RETRY_AFTER})

    def give_back(self, principal: UUID) -> None:
        with self._lock:
            self._held[principal] -= 1
            if not self._held[principal]:
                del self._held[principal]


class Line:
    """The client's connection while bytes cross it. `connection` is None where the server does not tell it.

    The server waits for ever for a client, and closing a connection politely it waits again, in the thread that accepts
    all others: so what is cut off is cut off here.
    """

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection
        self._end: threading.Timer | None = None

    def begin(self, idle: float, size: int) -> None:
        """`size` bytes cross it from now on."""
        if self._connection is None:
            return
        self._connection.settimeout(idle)  # the server makes it wait for ever again, for the next request
        self._end = threading.Timer(idle + size / LEAST_RATE, self.cut)
        self._end.daemon = True
        self._end.start()

    def done(self) -> None:
        if self._end is not None:
            self._end.cancel()

    def cut(self) -> None:
        """Nothing goes either way any more, and nobody waits for it to."""
        self._shut(socket.SHUT_RDWR)

    def stop_reading(self) -> None:
        """What still comes is not waited for; an answer can be sent."""
        self._shut(socket.SHUT_RD)

    def swallow(self, body: BinaryIO, size: int) -> None:
        """Read the rest of a body that is not wanted, if it comes at once: who is still sending reads no answer.
        One that was read already costs nothing."""
        if self._connection is None or size == 0:
            return
        patience = threading.Timer(PATIENCE, self.stop_reading)
        patience.daemon = True
        patience.start()
        try:
            while size > 0 and (data := body.read(min(size, _SWALLOW))):
                size -= len(data)
        except (OSError, ParseException):
            self.stop_reading()
        patience.cancel()

    def _shut(self, how: int) -> None:
        if self._connection is not None:
            with suppress(OSError):
                # Of the connection itself: TLS would first want to talk about it.
                socket.socket.shutdown(self._connection, how)


@contextmanager
def receiving(places: Places, principal: UUID, line: Line, body: BinaryIO, size: int, idle: float) -> Iterator[Read]:
    """A place to read a body of `size` bytes from; Problem 503 when there is none.

    What is not read of it, because it is refused, is read if it comes at once, and not waited for.
    """
    try:
        places.take(principal)
    except Problem:
        line.stop_reading()
        raise
    left = size

    def read(wanted: int) -> bytes:
        nonlocal left
        data = body.read(min(wanted, left))
        left -= len(data)
        return data

    line.begin(idle, size)
    try:
        yield read
    finally:
        line.done()
        line.swallow(body, left)
        places.give_back(principal)


class Sending:
    """`size` bytes of an open file from `offset` on, as a WSGI server sends them: by sendfile(2), or read piece by
    piece. Closing it ends the transfer, however that went."""

    def __init__(self, file: BinaryIO, offset: int, size: int, line: Line, places: Places, principal: UUID) -> None:
        self._file = file
        self._left = size
        self._line = line
        self._places = places
        self._principal = principal
        file.seek(offset)

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.close()
        self._line.done()
        if sys.exc_info()[0] is not None:  # the server closes us while what went wrong is on its way up
            self._line.cut()
        self._places.give_back(self._principal)
