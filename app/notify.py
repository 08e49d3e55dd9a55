"""Waking one another: the API the worker when there is work, the worker the API when some is done.

With SQLite, datagrams on local sockets below the run directory; with PostgreSQL, LISTEN and NOTIFY. A notification
only ever shortens a wait: everything it says is read again from the database, and both sides also look by themselves.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
from collections import defaultdict, deque
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from app.db import Database

WORK = "stratus_work"
DONE = "stratus_done"
#: How long a word waits for room at its listener, as a timeval: a queue holds ten (net.unix.max_dgram_qlen, unix(7)).
PATIENCE = struct.pack("ll", 0, 50_000)
#: Ends that are remembered for who begins to wait just after: a worker can be faster than the thread that asked it.
RECENT = 256


class Bus(Protocol):
    """`announce` is called after the commit. `listen` yields texts; None once it listens and each `idle` seconds."""

    def announce(self, channel: str, text: str = "") -> None: ...
    def listen(self, channel: str, idle: float, stop: threading.Event) -> Iterator[str | None]: ...


class SocketBus:
    """Datagram sockets: `worker.sock` for work, one file per listening process in `waiters/` for what is done."""

    def __init__(self, run_dir: Path) -> None:
        self._run = run_dir
        (run_dir / "waiters").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, PATIENCE)

    def announce(self, channel: str, text: str = "") -> None:
        receivers = [self._run / "worker.sock"] if channel == WORK else list((self._run / "waiters").iterdir())
        for path in receivers:
            self._send(path, text)

    def _send(self, path: Path, text: str) -> None:
        try:
            with _short(path) as address:
                self._sender.sendto(text.encode() or b"-", self._flags(path), address)
        except ConnectionRefusedError:
            if path.parent.name == "waiters":  # its process is gone
                path.unlink(missing_ok=True)
        except (FileNotFoundError, BlockingIOError):
            pass  # nobody is there, or has more than enough to read: both look by themselves

    @staticmethod
    def _flags(path: Path) -> int:
        """A worker with ten words to read is awake; for who waits, each word is another operation."""
        return socket.MSG_DONTWAIT if path.name == "worker.sock" else 0

    def listen(self, channel: str, idle: float, stop: threading.Event) -> Iterator[str | None]:
        name = "worker.sock" if channel == WORK else f"waiters/{os.getpid()}-{secrets.token_hex(4)}"
        path = self._run / name
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            with _short(path) as address:
                receiver.bind(address)
            receiver.settimeout(idle)
            try:
                yield None  # listening from here on: look once for what came before
                while not stop.is_set():
                    try:
                        yield receiver.recv(256).decode()
                    except TimeoutError:
                        yield None
            finally:
                path.unlink(missing_ok=True)


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """The same socket under a name that fits sun_path's 108 bytes (unix(7)), however deep the home lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class PostgresBus:
    """LISTEN/NOTIFY over connections of its own, outside the pool that answers requests."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine

    def announce(self, channel: str, text: str = "") -> None:
        # What is announced is committed already: that nobody hears it must not become an error.
        with suppress(OperationalError, PoolTimeout), self._engine.connect() as connection:
            connection.exec_driver_sql("SELECT pg_notify(%s, %s)", (channel, text))
            connection.commit()

    def listen(self, channel: str, idle: float, stop: threading.Event) -> Iterator[str | None]:
        import psycopg

        url = self._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        while not stop.is_set():
            try:
                with psycopg.connect(url, autocommit=True) as connection:
                    connection.execute(f"LISTEN {channel}")
                    yield None
                    while not stop.is_set():
                        got = False
                        for note in connection.notifies(timeout=idle, stop_after=1):
                            got = True
                            yield note.payload
                        if not got:
                            yield None
            except psycopg.OperationalError:
                yield None
                stop.wait(idle)


def open_bus(database: Database, run_dir: Path) -> Bus:
    return SocketBus(run_dir) if database.dialect == "sqlite" else PostgresBus(database)


class Waiters:
    """Threads of an API process that wait for operations to end; one listening thread wakes them.

    Only `places` of them wait long: who waits occupies a thread, and some must be left for everything else.
    """

    def __init__(self, bus: Bus, places: int = 8) -> None:
        self._bus = bus
        self._places = threading.Semaphore(places)
        self._lock = threading.Lock()
        self._events: dict[str, list[threading.Event]] = defaultdict(list)
        self._ended: deque[str] = deque(maxlen=RECENT)
        self._thread: threading.Thread | None = None

    @contextmanager
    def expect(self, operation_id: UUID) -> Iterator[threading.Event]:
        """An event that is set while there is reason to look at the operation: it is said to have ended, or what was
        said may have been missed."""
        event = threading.Event()
        key = str(operation_id)
        with self._lock:
            self._events[key].append(event)
            if self._listen() or key in self._ended:
                event.set()
        try:
            yield event
        finally:
            with self._lock:
                self._events[key].remove(event)
                if not self._events[key]:
                    del self._events[key]

    @contextmanager
    def place(self) -> Iterator[bool]:
        """Whether there is room to wait long."""
        granted = self._places.acquire(blocking=False)
        try:
            yield granted
        finally:
            if granted:
                self._places.release()

    def _listen(self) -> bool:
        """Begin to listen; False when that was done already."""
        # Started with the first wait and not before: a server forks its processes after loading the application.
        if self._thread is not None and self._thread.is_alive():
            return False
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="waiters", daemon=True)
        self._thread.start()
        started.wait(2)
        return True

    def _run(self, started: threading.Event) -> None:
        stop = threading.Event()
        for text in self._bus.listen(DONE, 1.0, stop):
            started.set()
            if text is None:
                continue
            with self._lock:
                self._ended.append(text)
                for event in self._events.get(text, ()):
                    event.set()
