"""How a volume is reached: the interface every iSCSI target behind the service has, its words and its errors.

A target holds nothing of its own: every export is derived from the database, converged by `ensure_export`, and can be
made again from nothing. All calls may be repeated; "already there" and "already gone" are success, after a look.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from uuid import UUID


@dataclass(frozen=True)
class Credentials:
    """A CHAP name and secret. The secret never shows in a repr, a log or an argv.

    A name belongs to one attachment for ever: targets cannot be asked for a secret again, so the same name is taken to
    have the same secret. Rotating a secret means a new name. Raises ValueError.
    """

    username: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", self.username):
            raise ValueError(f"CHAP name {self.username!r}: 1 to 128 of A-Z a-z 0-9 . _ : -")
        if not re.fullmatch(r"[!-~]{12,128}", self.password):  # RFC 7143 §9.2.1: at least 96 bits
            raise ValueError("CHAP secret: 12 to 128 printable ASCII characters without spaces")


@dataclass(frozen=True)
class Connection:
    """One initiator's right to log in.

    `initiator` is a name as `names.validate_initiator` returns it. `mutual` is what the target proves itself with.
    `networks` are CIDRs the initiator must come from, empty for any; see `Capabilities.networks`.
    """

    initiator: str
    credentials: Credentials
    mutual: Credentials | None = None
    networks: tuple[str, ...] = ()

    @property
    def login(self) -> Login:
        return Login(self.initiator, self.credentials.username, self.mutual.username if self.mutual else None)


@dataclass(frozen=True)
class Login:
    """Who may stay when others are drained: the names of a connection, without its secrets."""

    initiator: str
    username: str
    mutual_username: str | None = None


@dataclass(frozen=True)
class Export:
    """What a volume's target shall be. `path` is absolute, `size` the backing's bytes.

    `tid` is the target's number, one per volume for life, kept by the caller: with tgt it is part of the volume's
    SCSI identity (the second designator of VPD page 0x83).
    """

    volume_id: UUID
    tid: int
    path: Path
    size: int
    read_only: bool
    connections: tuple[Connection, ...]


@dataclass(frozen=True)
class Session:
    """One connection of an initiator. `initiator` is empty while its login has not finished."""

    volume_id: UUID
    initiator: str
    address: str
    session_id: int
    connection_id: int
    tid: int


@dataclass(frozen=True)
class ExportState:
    """What the target really has for one volume.

    `size` is in bytes; tgt tells it in whole MiB. `networks` are the addresses that may log in, `complete` says that
    every layer is there (LUN with the volume's identity, online, an account, an ACL): false for a half-made export.
    """

    volume_id: UUID
    tid: int
    iqn: str
    path: Path | None
    read_only: bool
    online: bool
    size: int
    initiators: frozenset[str]
    usernames: frozenset[str]
    mutuals: frozenset[str]
    networks: frozenset[str]
    complete: bool


@dataclass(frozen=True)
class Capabilities:
    """What a kind of target can do.

    `online_grow`: a volume grows while attached. `ro_per_initiator`: one volume, some initiators read-only, others not.
    `mutual_chap_many`: a different mutual secret for each connection of a volume. `networks`: a connection can be bound
    to networks. `hides_sessions`: a session without an initiator's name is one that is logged in and only counted.
    """

    online_grow: bool
    ro_per_initiator: bool
    mutual_chap_many: bool
    networks: bool
    hides_sessions: bool = False


class TargetError(Exception):
    """A target could not do what was asked."""


class TargetUnavailable(TargetError):
    """The target does not answer, or there is none. Whether the last request took effect is unknown: repeat it."""


class TargetBusy(TargetError):
    """Sessions stand in the way. `sessions` are those still listed."""

    def __init__(self, volume_id: UUID, sessions: Sequence[Session]) -> None:
        self.volume_id, self.sessions = volume_id, tuple(sessions)
        who = ", ".join(sorted({s.initiator or f"a login from {s.address}" for s in sessions})) or "unknown"
        super().__init__(f"volume {volume_id} has {len(sessions)} session(s): {who}")


class TargetLimit(TargetError):
    """The host has no room for another LUN. `resource` names what is short, `needed` and `free` count it."""

    def __init__(self, resource: str, needed: int, free: int) -> None:
        self.resource, self.needed, self.free = resource, needed, free
        super().__init__(f"no room for another LUN: it needs {needed} {resource}, {free} left")


class TargetRefused(TargetError):
    """The target answered no. `op` is what was asked, `code` the target's own number (0: we refused), `message` why."""

    def __init__(self, op: str, code: int, message: str) -> None:
        self.op, self.code, self.message = op, code, message
        super().__init__(f"{op}: {message}")


class Target(Protocol):
    """An iSCSI target. One caller per volume at a time; different volumes at once are fine. Raises TargetError."""

    @property
    def capabilities(self) -> Capabilities: ...

    def ensure_export(self, export: Export) -> None:
        """Converge to exactly `export`, layer by layer, and finish what an interrupted call left half-made.

        Nothing that is right already is touched: a live writer does not notice. A connection that is no longer wanted
        is revoked and its sessions are told to end; `drain` is what waits for that. A size that differs is a `grow`.
        Raises TargetBusy where path or read_only differ under sessions, TargetLimit, TargetRefused.
        """

    def drain(self, volume_id: UUID, keep: Collection[Login] = ()) -> list[Session]:
        """One pass of the fence: revoke the ACL and account of all but `keep`, end their sessions, tell who is left.

        Empty means drained: none of them can write any more, nor come back. A session with a write in flight stays
        listed, and that write still lands: call again until the list is empty, however long it takes.
        """

    def remove(self, volume_id: UUID) -> None:
        """Take the LUN and the target away; returning is the receipt. Absent is success, sessions raise TargetBusy."""

    def grow(self, export: Export) -> None:
        """Let initiators see `export.size`, to which the backing has been extended; they see no I/O error.

        Raises TargetBusy when writes in flight do not end in time: `ensure_export` or another `grow` finishes it.
        """

    def sessions(self) -> list[Session]:
        """All sessions on our volumes."""

    def inventory(self) -> list[ExportState]:
        """What is there, for all targets under our prefix."""

    def altered(self, export: Export) -> list[str]:
        """The layers that differ from `export` in what `inventory` does not tell (secrets, say), as far as they can be
        asked. `ensure_export` puts them right.
        """

    def foreign(self) -> list[str]:
        """The names of targets that are not ours. They are never touched."""


class TargetHost(Protocol):
    """What serves a service's exports on this host, and how it is watched. Raises TargetError, OSError."""

    @property
    def target(self) -> Target: ...

    def bring_up(self, rebuild: Callable[[], None]) -> str:
        """Make it serve: `rebuild` is called when exports can be made, the portals are opened after it. Says how.

        One that serves already (it outlived an earlier service) is taken over without its initiators noticing.
        """

    def watch(self, stopping: threading.Event) -> None:
        """Return when `stopping` is set; raises TargetUnavailable when it has ended, or no longer answers, before."""

    def stop(self) -> None:
        """End the sessions of all our exports, and the exports, in order. Not serving is success."""
