"""A worker inside the test's own process, with a real pool and a private tgtd: services in, bytes and exports out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from sqlalchemy import select

from app.auth import Caller
from app.db import Database
from app.housekeeping import Housekeeping
from app.keys import KeyRing, Signer
from app.models import Operation
from app.notify import WORK, open_bus
from app.operations import OPEN
from app.outside import Outside
from app.worker import Worker
from app.worker_process import tgt_host
from tests.support import rows
from tests.support.databases import settings_for
from tests.support.service import wait_until

Result = TypeVar("Result")


class House:
    """`sections`: settings that differ. `start` starts the worker; before, `claim` and `work` can be called by hand."""

    def __init__(self, home: Path, database: Database, **sections: object) -> None:
        url = database.engine.url.render_as_string(hide_password=False)
        self.settings = settings_for(home, url, **sections)
        self.database = database
        self.keys = KeyRing.create(self.settings.key_dir / "secrets.json")
        self.host = tgt_host(self.settings)
        self.daemon, self.target = self.host.daemon, self.host.target
        self.outside = Outside(self.settings, database, self.keys, self.target)
        self.bus = open_bus(database, self.settings.run_dir)
        self.worker = Worker(self.outside, self.bus)
        signer = Signer.load_or_create(self.settings.key_dir / "events.key")
        self.chores = Housekeeping(self.outside, signer, self.worker.ready, self.worker.stopping)
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self.worker.ready.set()
        self._threads = self.worker.start()

    def stop(self) -> None:
        self.worker.stopping.set()
        for thread in self._threads:
            thread.join(30)
        self.daemon.stop()

    def caller(self, name: str, role: str = "user", **values: object) -> Caller:
        """A new principal."""
        user = rows.user(name, role, **values)
        with self.database.write() as session:
            session.add(user)
        return Caller(user.id, name, role, "127.0.0.1", user.initiator)

    def do(self, service: Callable[..., Result], *arguments: object) -> Result:
        """Call a service function in a transaction of its own, and tell the worker."""
        with self.database.write() as session:
            result = service(session, *arguments)
        self.bus.announce(WORK)
        return result

    def ended(self, operation: Operation | None, timeout: float = 60) -> Operation:
        """The operation when it has ended."""
        assert operation is not None
        return wait_until(lambda: self._if_ended(operation.id), timeout, f"the end of {operation.kind}")

    def _if_ended(self, identifier: UUID) -> Operation | None:
        with self.database.read() as session:
            found = session.get_one(Operation, identifier)
        return None if found.state in OPEN else found

    def settle(self, timeout: float = 60) -> None:
        """Until no operation is open."""
        wait_until(lambda: not self.open_operations(), timeout, "the end of all operations")

    def open_operations(self) -> list[Operation]:
        with self.database.read() as session:
            return list(session.scalars(select(Operation).where(Operation.state.in_(OPEN))))


@contextmanager
def open_house(home: Path, database: Database, **sections: object) -> Iterator[House]:
    """A house whose pool is active and whose target answers; its worker does not run yet."""
    house = House(home, database, **sections)
    try:
        house.daemon.start()
        house.chores.watch_pools()
        house.chores.watch_images()
        yield house
    finally:
        house.stop()
