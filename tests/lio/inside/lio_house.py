"""Exports by LIO on files of an XFS, made quickly, and what tests look at in the kernel."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest

from iscsi.lio import LioTarget
from iscsi.names import target_name
from iscsi.target import Connection, Credentials, Export
from tests.support.initiator import Initiator, wait_until
from tests.support.kernel_initiator import KernelInitiator

PREFIX = "iqn.2026-11.org.example.stratus"
PORTAL = ("127.0.0.1", 3260)
MIB = 1 << 20

_serial = itertools.count(1)


def connection(node: str, *, mutual: Credentials | None = None) -> Connection:
    """A right to log in with a fresh account."""
    number = next(_serial)
    return Connection(f"iqn.2026-11.org.example:{node}", Credentials(f"user{number}", f"secret-{number:08d}"), mutual)


@dataclass
class House:
    """LIO with its portals open, and what tests do with it."""

    directory: Path
    lock: Path
    files: list[Path] = field(default_factory=list)
    tids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    target: LioTarget = field(init=False)

    def __post_init__(self) -> None:
        self.target = self.another()
        self.target.open_portals()

    def another(self, portals: Sequence[tuple[str, int]] = (PORTAL,), **options: object) -> LioTarget:
        """The target of a service that was started anew; its portals are not open yet."""
        return LioTarget(PREFIX, portals, self.lock, **options)  # type: ignore[arg-type]

    def wait_sessions(self, number: int) -> None:
        """LIO counts a session a moment after its initiator was told that it is logged in."""
        wait_until(lambda: len(self.target.sessions()) == number)

    def export(
        self, *connections: Connection, size: int = 16 * MIB, read_only: bool = False, path: Path | None = None
    ) -> Export:
        """An export that is not made yet, on a fresh file."""
        volume_id = uuid4()
        if path is None:
            path = self.directory / f"{volume_id}.raw"
            path.touch()
            os.truncate(path, size)
            self.files.append(path)
        return Export(volume_id, next(self.tids), path, size, read_only, connections or (connection("node1"),))

    def exported(self, *connections: Connection, **options: object) -> Export:
        export = self.export(*connections, **options)  # type: ignore[arg-type]
        self.target.ensure_export(export)
        return export

    def clear(self) -> None:
        """End and remove every export."""
        for state in self.target.inventory():
            wait_until(lambda volume_id=state.volume_id: self.target.drain(volume_id) == [])  # type: ignore[misc]
            self.target.remove(state.volume_id)

    def initiator(self, export: Export, who: Connection | None = None) -> Initiator:
        """A libiscsi initiator."""
        return Initiator(*self._of(export, who))

    def kernel(self, export: Export, who: Connection | None = None) -> KernelInitiator:
        return KernelInitiator(*self._of(export, who))

    def _of(self, export: Export, who: Connection | None) -> tuple[str, str, str, str, str, tuple[str, str] | None]:
        who = who or export.connections[0]
        mutual = (who.mutual.username, who.mutual.password) if who.mutual else None
        username, password = who.credentials.username, who.credentials.password
        portal, iqn = f"{PORTAL[0]}:{PORTAL[1]}", target_name(PREFIX, export.volume_id)
        return portal, iqn, who.initiator, username, password, mutual


@pytest.fixture
def house(lio: Path, xfs: Path, tmp_path: Path) -> Iterator[House]:
    house = House(xfs, tmp_path / "lio.lock")
    yield house
    for path in house.files:
        path.unlink(missing_ok=True)


class Interrupted(Exception):
    pass


def interrupt_at(number: int, seen: list[str]) -> Callable[[str], None]:
    """A trace hook that stops a call after its step `number`, as if the process had died there."""

    def trace(step: str) -> None:
        seen.append(step)
        if len(seen) == number:
            raise Interrupted(step)

    return trace


@dataclass
class Suspendable:
    """A block device whose I/O can be held: device-mapper over a loop device over the file `backing`."""

    path: Path
    backing: Path

    @property
    def _name(self) -> str:
        return self.path.name

    def hold(self) -> None:
        _dmsetup("suspend", "--nolockfs", "--noflush", self._name)

    def release(self) -> None:
        _dmsetup("resume", self._name)


@pytest.fixture
def suspendable(house: House, xfs: Path) -> Iterator[Suspendable]:
    """16 MiB; what is exported from it is removed before it goes."""
    name, backing = f"hold-{uuid4().hex[:8]}", xfs / f"{uuid4()}.hold"
    backing.touch()
    os.truncate(backing, 16 * MIB)
    found = subprocess.run(["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True)
    device = found.stdout.strip()
    _dmsetup("create", name, "--table", f"0 {16 * MIB // 512} linear {device} 0")
    held = Suspendable(Path("/dev/mapper", name), backing)
    yield held
    held.release()
    house.clear()
    _dmsetup("remove", "--retry", name)
    subprocess.run(["losetup", "--detach", device], check=True)
    backing.unlink()


def _dmsetup(*arguments: str) -> None:
    environment = {**os.environ, "DM_DISABLE_UDEV": "1"}  # nobody else here makes the nodes in /dev
    subprocess.run(["dmsetup", *arguments], check=True, capture_output=True, env=environment)
