"""A private tgtd per test, exports made quickly, and a way to hold its writes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from iscsi.names import target_name
from iscsi.target import Connection, Credentials, Export
from iscsi.tgt import TgtTarget
from iscsi.tgt_daemon import TgtDaemon
from tests.support.initiator import Initiator
from tests.support.shim import Brake, build_shim

PREFIX = "iqn.2026-11.org.example.stratus"
MIB = 1 << 20


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def brake(tmp_path: Path) -> Iterator[Brake]:
    directory = tmp_path / "brake"
    directory.mkdir()
    brake = Brake(directory)
    yield brake
    brake.off()


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Callable[..., TgtDaemon]]:
    """Makes daemons that are not started yet; whatever runs at the end is killed."""
    made: list[TgtDaemon] = []

    def make(name: str = "run", control: int = 7, **environment: str) -> TgtDaemon:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True, parents=True)
        made.append(TgtDaemon(directory, tmp_path / "tgtd.log", control, environment=environment))
        return made[-1]

    yield make
    for daemon in made:
        daemon.kill()


@dataclass
class House:
    """A running tgtd with an open portal, and what tests do with it."""

    directory: Path
    daemon: TgtDaemon
    portal: str = ""
    tids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def target(self) -> TgtTarget:
        return TgtTarget(self.daemon.ipc, PREFIX)

    def start(self) -> None:
        self.daemon.start()
        self.open()

    def open(self) -> None:
        self.portal = self.daemon.open_portal(self.portal or "127.0.0.1:0")

    def export(self, *connections: Connection, size: int = 16 * MIB, read_only: bool = False) -> Export:
        """An export that is not made yet, on a fresh file."""
        volume_id = uuid4()
        path = self.directory / f"{volume_id}.raw"
        path.touch()
        os.truncate(path, size)
        return Export(volume_id, next(self.tids), path, size, read_only, connections or (connection("node1"),))

    def exported(self, *connections: Connection, size: int = 16 * MIB, read_only: bool = False) -> Export:
        export = self.export(*connections, size=size, read_only=read_only)
        self.target.ensure_export(export)
        return export

    def initiator(self, export: Export, number: int = 0) -> Initiator:
        return self.initiator_of(export.volume_id, export.connections[number])

    def initiator_of(self, volume_id: UUID, who: Connection) -> Initiator:
        mutual = (who.mutual.username, who.mutual.password) if who.mutual else None
        username, password = who.credentials.username, who.credentials.password
        return Initiator(self.portal, target_name(PREFIX, volume_id), who.initiator, username, password, mutual)


@pytest.fixture
def house(tmp_path: Path, daemons: Callable[..., TgtDaemon]) -> House:
    house = House(tmp_path, daemons())
    house.start()
    return house


@pytest.fixture
def slow_house(tmp_path: Path, daemons: Callable[..., TgtDaemon], shim: Path, brake: Brake) -> House:
    """A house whose tgtd heeds the brake."""
    house = House(tmp_path, daemons(LD_PRELOAD=str(shim), SHIM_DIR=str(brake.directory)))
    house.start()
    return house


_serial = itertools.count(1)


def connection(node: str, *, mutual: Credentials | None = None) -> Connection:
    """A right to log in with a fresh account."""
    number = next(_serial)
    return Connection(f"iqn.2026-11.org.example:{node}", Credentials(f"user{number}", f"secret-{number:08d}"), mutual)
