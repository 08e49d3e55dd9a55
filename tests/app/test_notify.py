"""Waking one another, and doing without when nobody hears it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from app.db import Database
from app.notify import DONE, WORK, Bus, PostgresBus, SocketBus, Waiters, open_bus
from tests.support.postgres import Postgres
from tests.support.service import wait_until


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    deep = tmp_path / ("d" * 100)  # longer than a socket's address may be
    deep.mkdir()
    return deep


@pytest.fixture
def bus(database: Database, run_dir: Path) -> Bus:
    return open_bus(database, run_dir)


class Listener:
    """What a thread hears; `open` once it listens."""

    def __init__(self, bus: Bus, channel: str, idle: float = 0.1) -> None:
        self.heard: list[str] = []
        self.open, self.stop, self.idle_turns = threading.Event(), threading.Event(), 0
        self._thread = threading.Thread(target=self._run, args=(bus, channel, idle))
        self._thread.start()

    def _run(self, bus: Bus, channel: str, idle: float) -> None:
        for text in bus.listen(channel, idle, self.stop):
            if text is None:
                self.idle_turns += 1
            else:
                self.heard.append(text)
            self.open.set()

    def end(self) -> None:
        self.stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def listening(bus: Bus, channel: str) -> Iterator[Listener]:
    listener = Listener(bus, channel)
    try:
        assert listener.open.wait(20)
        yield listener
    finally:
        listener.end()


def test_each_kind_of_database_has_its_bus(database: Database, bus: Bus) -> None:
    assert isinstance(bus, {"sqlite": SocketBus, "postgresql": PostgresBus}[database.dialect])


def test_work_wakes_the_worker_and_what_is_done_wakes_all_who_wait(bus: Bus) -> None:
    with listening(bus, WORK) as worker, listening(bus, DONE) as first, listening(bus, DONE) as second:
        bus.announce(WORK, "data")
        bus.announce(DONE, "an-operation")
        wait_until(lambda: worker.heard and first.heard and second.heard)
        assert (worker.heard, first.heard, second.heard) == (["data"], ["an-operation"], ["an-operation"])


def test_who_hears_nothing_looks_by_itself(bus: Bus) -> None:
    with listening(bus, WORK) as worker:
        wait_until(lambda: worker.idle_turns >= 3)
        assert worker.heard == []


def test_an_announcement_that_nobody_hears_is_no_error(bus: Bus) -> None:
    bus.announce(WORK)
    bus.announce(DONE, "x")


def test_an_announcement_without_text_wakes_too(bus: Bus) -> None:
    with listening(bus, WORK) as worker:
        bus.announce(WORK)
        wait_until(lambda: worker.heard)


def test_sockets_of_processes_that_died_are_forgotten(run_dir: Path) -> None:
    bus = SocketBus(run_dir)
    pid = os.fork()
    if pid == 0:
        listening_on = bus.listen(DONE, 1, threading.Event())
        next(iter(listening_on))
        os._exit(0)  # its socket stays behind
    os.waitpid(pid, 0)
    assert len(list((run_dir / "waiters").iterdir())) == 1
    bus.announce(DONE, "x")
    assert list((run_dir / "waiters").iterdir()) == []


def test_a_listener_that_reads_nothing_holds_nobody_up(run_dir: Path) -> None:
    bus = SocketBus(run_dir)
    deaf = bus.listen(WORK, 1, threading.Event())
    assert next(iter(deaf)) is None
    for number in range(5000):
        bus.announce(WORK, str(number))
    deaf.close()  # type: ignore[attr-defined]
    assert not (run_dir / "worker.sock").exists()


def test_a_new_worker_takes_the_place_of_a_dead_ones_socket(run_dir: Path) -> None:
    bus = SocketBus(run_dir)
    (run_dir / "worker.sock").touch()
    with listening(bus, WORK) as worker:
        bus.announce(WORK, "data")
        wait_until(lambda: worker.heard)


def test_a_lost_connection_to_postgresql_costs_a_moment(
    postgres: Postgres, postgres_template: str, run_dir: Path
) -> None:
    name = postgres.create(postgres_template)
    database = Database(postgres.url(name))
    bus = open_bus(database, run_dir)
    try:
        with listening(bus, WORK) as worker:
            postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            wait_until(lambda: _heard(bus, worker))
    finally:
        database.close()
        postgres.drop(name)


def _heard(bus: Bus, worker: Listener) -> bool:
    bus.announce(WORK, "again")
    time.sleep(0.05)
    return "again" in worker.heard


def test_what_cannot_be_announced_is_no_error_either(tmp_path: Path, run_dir: Path) -> None:
    """It is committed already: whoever waits for it looks by itself."""
    database = Database(f"postgresql+psycopg://nobody@/nothing?host={tmp_path}")
    bus = open_bus(database, run_dir)
    bus.announce(WORK, "data")
    listener = Listener(bus, WORK, idle=0.05)
    wait_until(lambda: listener.idle_turns > 2)
    listener.end()


# ---------------------------------------------------------------- waiters


def test_many_threads_wait_each_for_its_own_operation(bus: Bus) -> None:
    waiters, operations = Waiters(bus), [uuid4() for _ in range(30)]
    expected = threading.Barrier(31)

    def wait(number: int) -> bool:
        with waiters.expect(operations[number]) as ended:
            expected.wait()
            return ended.wait(20)

    with ThreadPoolExecutor(30) as pool:
        found = [pool.submit(wait, number) for number in range(30)]
        expected.wait()
        for identifier in operations:
            bus.announce(DONE, str(identifier))
        assert all(future.result() for future in found)
    assert waiters._events == {}


def test_many_wait_for_the_same_operation(bus: Bus) -> None:
    waiters, operation = Waiters(bus), uuid4()
    expected = threading.Barrier(9)

    def wait(_: int) -> bool:
        with waiters.expect(operation) as ended:
            expected.wait()
            return ended.wait(20)

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(wait, number) for number in range(8)]
        expected.wait()
        bus.announce(DONE, str(operation))
        assert all(future.result() for future in found)


def attentive(bus: Bus) -> Waiters:
    waiters = Waiters(bus)
    with waiters.expect(uuid4()) as news:
        assert news.is_set()  # what was said before it listened, nobody heard: look
    return waiters


def test_an_end_that_was_said_just_before_the_wait_is_known(bus: Bus) -> None:
    waiters, early, late = attentive(bus), uuid4(), uuid4()
    with waiters.expect(late) as ended:
        bus.announce(DONE, str(early))
        bus.announce(DONE, str(late))
        assert ended.wait(20)
    with waiters.expect(early) as ended:
        assert ended.is_set()


def test_who_waits_for_another_operation_is_not_woken(bus: Bus) -> None:
    waiters, mine, other = attentive(bus), uuid4(), uuid4()
    with waiters.expect(mine) as ended, waiters.expect(other) as theirs:
        bus.announce(DONE, str(other))
        assert theirs.wait(20)
        assert not ended.is_set()


class MutedBus:
    """Every notification is lost."""

    def announce(self, channel: str, text: str = "") -> None:
        pass

    def listen(self, channel: str, idle: float, stop: threading.Event) -> Iterator[str | None]:
        while not stop.wait(idle):
            yield None


def test_waiting_ends_by_itself_when_notifications_are_lost() -> None:
    with attentive(MutedBus()).expect(uuid4()) as ended:
        assert not ended.wait(0.05)


class BrokenBus(MutedBus):
    """Breaks once, as when its directory was away for a moment."""

    def __init__(self, inner: Bus) -> None:
        self.inner, self.broken = inner, 0

    def listen(self, channel: str, idle: float, stop: threading.Event) -> Iterator[str | None]:
        if not self.broken:
            self.broken += 1
            raise FileNotFoundError("waiters")
        return self.inner.listen(channel, idle, stop)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_listener_that_broke_is_started_again_with_the_next_wait(bus: Bus) -> None:
    waiters, operation = Waiters(BrokenBus(bus)), uuid4()
    with waiters.expect(uuid4()):
        pass

    def woken() -> bool:
        with waiters.expect(operation) as ended:
            bus.announce(DONE, str(operation))
            return ended.wait(0.2)

    wait: Callable[[], bool] = woken
    wait_until(wait)
