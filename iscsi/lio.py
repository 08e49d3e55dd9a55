"""Exports by LIO, the kernel's own target: layers in an order that cannot leak, a fence that holds.

Building goes backstore → target and portal group → LUN → ACLs, each with its LUN first and its secret last → portals →
enabled. Taking down starts with the secrets. Each layer is looked at by itself and changed only where it differs.

How the fence works: an ACL that has lost its secret and its LUN lets nobody in and nobody write; then its sessions are
ended. A write that is in flight by then still lands, and until it has, LIO counts the session. The ACL itself stays
until its group goes: to delete it is to wait for a login that stopped half-way, which needs no secret and may last for
ever. So when nobody is left the group is closed and its LUN and the backstore are deleted, which is the receipt, for
no way leads to the bytes any more; the rest is left to an errand.

A file is exported through a loop device with direct I/O, for LIO's own file backstore does not grow online. LIO's saved
configuration (saveconfig.json) is not used: the database knows what shall be.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from rtslib_fb import RTSLibError, RTSLibNotInCFSError  # type: ignore[import-untyped]

from iscsi import lio_configfs as configfs
from iscsi import names
from iscsi.lio_backstores import BackstoreLayer, identity, serves
from iscsi.lio_checks import check_export
from iscsi.lio_configfs import Volume
from iscsi.lio_drift import altered
from iscsi.lio_errands import Errands
from iscsi.lio_guard import Degraded, Guard
from iscsi.lio_layers import Layers, has_attributes, load
from iscsi.lio_sessions import end_sessions, sessions_of
from iscsi.target import (
    Capabilities,
    Export,
    ExportState,
    Login,
    Session,
    TargetBusy,
    TargetRefused,
)

_T = TypeVar("_T")
_PATIENCE = 1.0  # seconds; a deletion that waits for no peer takes some ten milliseconds


def _no_trace(step: str) -> None:
    pass


class LioTarget:
    """`iscsi.target.Target` on the kernel's LIO. What is not named after `prefix` is never touched.

    `portals` are (host, port) pairs, IPv6 hosts without brackets. Until `open_portals` was called exports are built
    whole but without portals; those that have some, from an earlier service, keep them. `lock` is a file for all hands
    on this host. `deadline` is in seconds (see `lio_guard`). `trace` is called with the name of each step done.
    """

    capabilities = Capabilities(
        online_grow=True, ro_per_initiator=True, mutual_chap_many=True, networks=False, hides_sessions=True
    )

    def __init__(
        self,
        prefix: str,
        portals: Sequence[tuple[str, int]],
        lock: Path,
        *,
        deadline: float = 20.0,
        trace: Callable[[str], None] = _no_trace,
    ) -> None:
        self._prefix, self._open = prefix.lower(), False
        self._portals = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in portals]
        self._guard, self._errands, self._on_step = Guard(lock, deadline), Errands(), trace

    @property
    def degraded(self) -> Degraded | None:
        """The oldest call that the kernel has not answered in time, nor since; None when all is well."""
        return self._guard.degraded

    def open_portals(self) -> None:
        """From now on every export has its portals, those that are there at once. Raises TargetRefused."""
        self._open = True
        for volume in self._look("list targets", self._ours):
            self._change(f"open portals of {volume.id}", functools.partial(self._ensure_portals, volume))

    def ensure_export(self, export: Export) -> None:
        self._change(f"export {export.volume_id}", lambda: self._converge(export))

    def grow(self, export: Export) -> None:
        self._change(f"grow {export.volume_id}", lambda: self._converge(export))

    def drain(self, volume_id: UUID, keep: Collection[Login] = ()) -> list[Session]:
        return self._change(f"drain {volume_id}", lambda: self._drain(self._volume(volume_id), keep))

    def remove(self, volume_id: UUID) -> None:
        self._change(f"remove {volume_id}", lambda: self._remove(self._volume(volume_id)))

    def sessions(self) -> list[Session]:
        return self._look("sessions", lambda: [s for volume in self._ours() for s in sessions_of(volume)])

    def inventory(self) -> list[ExportState]:
        return self._look("inventory", lambda: [self._state(volume) for volume in self._ours()])

    def altered(self, export: Export) -> list[str]:
        return self._look(f"layers of {export.volume_id}", lambda: altered(self._volume(export.volume_id), export))

    def foreign(self) -> list[str]:
        """Targets by their names, backstores as SLOT/NAME."""
        return self._look("foreign", self._foreign)

    # --- building

    def _converge(self, export: Export) -> None:
        check_export(export)
        volume = self._volume(export.volume_id)
        try:
            self._ensure_layers(export)
        except (FileNotFoundError, RTSLibNotInCFSError) as error:
            # What another hand's errand was at has gone between our look and our step.
            raise TargetBusy(volume.id, [_somebody(volume)]) from error

    def _ensure_layers(self, export: Export) -> None:
        volume = self._room(export)
        layers, below = self._layers(volume), BackstoreLayer(volume, self._trace)
        backstore = below.ensure(export)
        below.ensure_size(backstore, export.size)
        layers.ensure_group()
        self._expel(volume, layers, {connection.initiator for connection in export.connections})
        self._require_settled(volume)
        layers.ensure_lun(backstore, export.tid)
        for connection in export.connections:
            layers.ensure_acl(connection, read_only=export.read_only)
        self._ensure_portals(volume)
        layers.enable()

    def _room(self, export: Export) -> Volume:
        """The volume, cleared of what cannot stay."""
        volume = self._volume(export.volume_id)
        self._require_settled(volume)
        if not self._can_stay(volume, export):
            self._remove(volume)
        if volume.dead():
            self._bury(volume)
        if volume.dead() or self._errands.running(volume.group):
            raise TargetBusy(volume.id, [_somebody(volume)])
        return volume

    def _can_stay(self, volume: Volume, export: Export) -> bool:
        backstore, exported = volume.backstore(), volume.exported()
        if backstore is None:
            return not os.path.isdir(volume.group)
        right = BackstoreLayer(volume, self._trace).is_right(backstore, export)
        return right and (exported is None or exported[1] == backstore.path)

    def _ensure_portals(self, volume: Volume) -> None:
        if not self._open or not volume.exported() or self._unsettled(volume):
            return
        if stale := self._layers(volume).ensure_portals(self._portals):
            self._settle(volume, stale)
            self._trace("portals removed")

    # --- taking down

    def _drain(self, volume: Volume, keep: Collection[Login]) -> list[Session]:
        if unsettled := self._unsettled(volume):
            return unsettled if keep else self._shut(volume)
        layers, kept = self._layers(volume), {login.initiator: login for login in keep}
        for acl in volume.acls():
            if acl.initiator in kept and Login(acl.initiator, acl.username, acl.mutual_username or None) not in keep:
                layers.forget_secrets(acl.initiator)
        return self._expel(volume, layers, kept.keys())

    def _expel(self, volume: Volume, layers: Layers, kept: Collection[str]) -> list[Session]:
        """Fence all initiators but `kept`; returns the sessions that are not over."""
        fenced = [initiator for initiator in volume.initiators() if initiator not in kept]
        for initiator in fenced:
            layers.revoke(initiator)
        if _others(volume, kept):
            for initiator in fenced:
                end_sessions(volume.acl_path(initiator), self._errands)
        left = _others(volume, kept)
        if not kept or any(session.initiator for session in left):
            return left
        return self._hidden(volume, fenced) if left else []

    def _hidden(self, volume: Volume, fenced: list[str]) -> list[Session]:
        """Of those that LIO counts and does not show. They may be of a kept one that has several, which nothing tells
        but this: who has none is one whose ACL can be deleted."""
        acls = {initiator: volume.acl_path(initiator) for initiator in fenced}
        pending = [initiator for initiator, acl in acls.items() if self._errands.running(acl)]
        if not pending and fenced and not self._settle(volume, list(acls.values())):
            pending = fenced
        return [Session(volume.id, initiator, "", 0, 0, volume.tid()) for initiator in pending]

    def _shut(self, volume: Volume) -> list[Session]:
        """End the sessions of everybody, without a look at who that is."""
        self._errands.run(f"{volume.group}/enable", [("write", volume.group, "enable", "0")], _PATIENCE)
        return sessions_of(volume) or ([_somebody(volume)] if volume.enabled() else [])

    def _remove(self, volume: Volume) -> None:
        if left := sessions_of(volume) or self._drain(volume, ()):
            raise TargetBusy(volume.id, left)
        self._layers(volume).close()
        BackstoreLayer(volume, self._trace).delete()
        self._bury(volume)

    def _bury(self, volume: Volume) -> None:
        """Delete the target with its dead group. While a half-made login is there it stays, which nobody waits for.

        The target is the errand's last step: when the peer has gone nothing is left of it without another look.
        """
        if not os.path.isdir(volume.target) or (os.path.isdir(volume.group) and not volume.dead()):
            return
        steps = [("delete", f"{volume.group}/acls"), ("delete", volume.group), ("rmdir", volume.target)]
        self._errands.run(volume.group, steps, _PATIENCE)
        if not os.path.isdir(volume.target):
            self._trace("target deleted")

    def _settle(self, volume: Volume, paths: list[str]) -> bool:
        """Delete ACLs that were revoked, or portals, of a group that lives; whether they are gone.

        The errand may wait long, and another hand may admit an initiator anew as soon as it can list the ACLs: one
        that has its LUN back is not deleted, for the kernel deletes none with a LUN.
        """
        os.mkdir(volume.mark)
        self._errands.run(volume.group, [("rmdir", path) for path in paths], _PATIENCE)
        return not self._unsettled(volume) and not any(map(os.path.isdir, paths))

    def _require_settled(self, volume: Volume) -> None:
        if unsettled := self._unsettled(volume):
            raise TargetBusy(volume.id, unsettled)

    def _unsettled(self, volume: Volume) -> list[Session]:
        """What is in the way of those who would list the ACLs and portals."""
        if not volume.settling():
            return []
        look = [("list", f"{volume.group}/acls"), ("list", f"{volume.group}/np")]
        if self._errands.run(volume.group, look, _PATIENCE):
            os.rmdir(volume.mark)
            return []
        return sessions_of(volume) or [_somebody(volume)]

    # --- looking

    def _volume(self, volume_id: UUID) -> Volume:
        return Volume(volume_id, names.target_name(self._prefix, volume_id))

    def _layers(self, volume: Volume) -> Layers:
        return Layers(volume, self._trace)

    def _ours(self) -> list[Volume]:
        """Every volume that has a target or a backstore."""
        backstores = (name for slot, name in configfs.backstore_names() if self._is_ours(slot, name))
        found = {*configfs.target_names(), *backstores}
        volumes = ((names.volume_of(self._prefix, name), name) for name in sorted(found))
        return [Volume(volume_id, name) for volume_id, name in volumes if volume_id]

    def _foreign(self) -> list[str]:
        targets = [name for name in configfs.target_names() if names.volume_of(self._prefix, name) is None]
        found = configfs.backstore_names()
        return targets + [f"{slot}/{name}" for slot, name in found if not self._is_ours(slot, name)]

    def _is_ours(self, slot: str, name: str) -> bool:
        volume_id = names.volume_of(self._prefix, name)
        return volume_id is not None and slot in {f"iblock_{number}" for number in configfs.slots(volume_id)}

    def _state(self, volume: Volume) -> ExportState:
        backstore, enabled = volume.backstore(), volume.enabled()
        acls = [acl for acl in volume.acls() if not acl.revoked]
        admitted = [acl for acl in acls if acl.complete]
        claim = Path(backstore.claim) if backstore and serves(backstore, Path(backstore.claim)) else None
        return ExportState(
            volume_id=volume.id,
            tid=volume.tid(),
            iqn=volume.iqn,
            path=claim,
            read_only=backstore is not None and backstore.read_only,
            online=backstore is not None and backstore.enabled and enabled,
            size=backstore.size if backstore else 0,
            initiators=frozenset(acl.initiator for acl in admitted),
            usernames=frozenset(acl.username for acl in admitted),
            mutuals=frozenset(acl.mutual_username for acl in admitted if acl.mutual_username),
            networks=frozenset(),
            complete=bool(acls) and acls == admitted and enabled and self._is_whole(volume, backstore),
        )

    def _is_whole(self, volume: Volume, backstore: configfs.Backstore | None) -> bool:
        """Whether the layers between the device and the ACLs are as we make them."""
        if backstore is None or not backstore.enabled or backstore.identity != identity(volume):
            return False
        exported = volume.exported()
        portals = not self._open or volume.portals() == sorted(self._portals)
        return portals and exported is not None and exported[1] == backstore.path and has_attributes(volume)

    # --- into the kernel

    def _trace(self, step: str) -> None:
        self._on_step(step)
        self._guard.step()

    def _look(self, call: str, work: Callable[[], _T]) -> _T:
        return self._guard.look(call, lambda: _translated(call, work))

    def _change(self, call: str, work: Callable[[], _T]) -> _T:
        return self._guard.change(call, lambda: _translated(call, work))


def _somebody(volume: Volume) -> Session:
    return Session(volume.id, "", "somewhere that is not finished", 0, 0, volume.tid())


def _others(volume: Volume, kept: Collection[str]) -> list[Session]:
    return [session for session in sessions_of(volume) if session.initiator not in kept]


def _translated(call: str, work: Callable[[], _T]) -> _T:
    """What the kernel or rtslib refuse as TargetRefused. Raises TargetUnavailable when LIO cannot be looked at,
    lest nothing to be seen is taken for nothing there."""
    load()
    try:
        return work()
    except RTSLibError as error:
        raise TargetRefused(call, 0, str(error)) from error
    except OSError as error:
        raise TargetRefused(call, error.errno or 0, str(error)) from error
