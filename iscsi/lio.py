"""Exports by LIO, the kernel's own target: layers in an order that cannot leak, a fence that holds.

Building goes backstore → target and portal group → LUN → ACLs, each with its LUN first and its secret last → portals →
enabled. Taking down starts with the secrets. Each layer is looked at by itself and changed only where it differs.

How the fence works: an ACL that has lost its secret and its LUN lets nobody in and nobody write; then its sessions are
ended. A write that is in flight by then still lands, and until it has, LIO counts the session. Deleting the ACL would
wait for that too, but meanwhile nobody could even list the volume's ACLs: they are deleted only when nobody is left.

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

from rtslib_fb import RTSLibError  # type: ignore[import-untyped]

from iscsi import lio_configfs as configfs
from iscsi import names
from iscsi.lio_backstores import BackstoreLayer, identity, serves
from iscsi.lio_checks import check_export
from iscsi.lio_configfs import Volume
from iscsi.lio_guard import Degraded, Guard
from iscsi.lio_layers import Layers, end_sessions, has_attributes, load
from iscsi.lio_sessions import Endings, count, sessions_of
from iscsi.target import (
    Capabilities,
    Export,
    ExportState,
    Login,
    Session,
    TargetBusy,
    TargetRefused,
    TargetUnavailable,
)

_T = TypeVar("_T")
_PATIENCE = 0.25  # seconds; a session without a write in flight ends within a few milliseconds


def _no_trace(step: str) -> None:
    pass


class LioTarget:
    """`iscsi.target.Target` on the kernel's LIO. What is not named after `prefix` is never touched.

    `portals` are (host, port) pairs, IPv6 hosts without brackets. Until `open_portals` was called exports are built
    whole but without portals; those that have some, from an earlier service, keep them. `lock` is a file for all hands
    on this host. `deadline` is in seconds (see `lio_guard`); LIO takes 15 to give up a login that does not go on, and
    keeps its ACL until then. `trace` is called with the name of each step done.
    """

    capabilities = Capabilities(online_grow=True, ro_per_initiator=True, mutual_chap_many=True, networks=False)

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
        self._guard, self._endings, self._on_step = Guard(lock, deadline), Endings(end_sessions, _PATIENCE), trace

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

    def foreign(self) -> list[str]:
        """Targets by their names, backstores as SLOT/NAME."""
        return self._look("foreign", self._foreign)

    # --- building

    def _converge(self, export: Export) -> None:
        check_export(export)
        load()
        volume = self._volume(export.volume_id)
        layers, below = self._layers(volume), BackstoreLayer(volume, self._trace)
        if not self._can_stay(volume, below, export):
            self._remove(volume)
        backstore = below.ensure(export)
        below.ensure_size(backstore, export.size)
        layers.ensure_group()
        self._expel(volume, layers, {connection.initiator for connection in export.connections})
        layers.ensure_lun(backstore, export.tid)
        for connection in export.connections:
            layers.ensure_acl(connection, read_only=export.read_only)
        self._ensure_portals(volume)
        layers.enable()

    def _can_stay(self, volume: Volume, below: BackstoreLayer, export: Export) -> bool:
        backstore, exported = volume.backstore(), volume.exported()
        if backstore is None:
            return not volume.exists()
        return below.is_right(backstore, export) and (exported is None or exported[1] == backstore.path)

    def _ensure_portals(self, volume: Volume) -> None:
        if self._open and os.path.isdir(volume.group):
            self._layers(volume).ensure_portals(self._portals)

    # --- taking down

    def _drain(self, volume: Volume, keep: Collection[Login]) -> list[Session]:
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
        if count(volume):
            for initiator in fenced:
                self._endings.begin(volume.acl_path(initiator))
        left = [session for session in sessions_of(volume) if session.initiator not in kept]
        if not kept or any(session.initiator for session in left):
            return left
        return self._delete_acls(volume, layers, fenced)

    def _delete_acls(self, volume: Volume, layers: Layers, fenced: list[str]) -> list[Session]:
        """Of initiators that show no session: one that is hidden is theirs or a kept one's, which only this tells."""
        if pending := [initiator for initiator in fenced if self._endings.running(volume.acl_path(initiator))]:
            return [Session(volume.id, initiator, "", 0, 0, volume.tid()) for initiator in pending]
        for initiator in fenced:
            layers.delete_acl(initiator)
        return []

    def _remove(self, volume: Volume) -> None:
        self._require_idle(volume)
        layers = self._layers(volume)
        self._expel(volume, layers, ())
        self._require_idle(volume)
        layers.delete_target()
        BackstoreLayer(volume, self._trace).delete()

    def _require_idle(self, volume: Volume) -> None:
        if sessions := sessions_of(volume):
            raise TargetBusy(volume.id, sessions)

    # --- looking

    def _volume(self, volume_id: UUID) -> Volume:
        return Volume(volume_id, names.target_name(self._prefix, volume_id))

    def _layers(self, volume: Volume) -> Layers:
        return Layers(volume, self._trace)

    def _ours(self) -> list[Volume]:
        """Every volume that has a target or a backstore."""
        found = {*configfs.target_names(), *(name for slot, name in self._backstores() if self._is_ours(slot, name))}
        volumes = ((names.volume_of(self._prefix, name), name) for name in sorted(found))
        return [Volume(volume_id, name) for volume_id, name in volumes if volume_id]

    def _foreign(self) -> list[str]:
        targets = [name for name in configfs.target_names() if names.volume_of(self._prefix, name) is None]
        return targets + [f"{slot}/{name}" for slot, name in self._backstores() if not self._is_ours(slot, name)]

    def _backstores(self) -> list[tuple[str, str]]:
        return list(configfs.backstore_names())

    def _is_ours(self, slot: str, name: str) -> bool:
        volume_id = names.volume_of(self._prefix, name)
        return volume_id is not None and slot in {f"iblock_{number}" for number in configfs.slots(volume_id)}

    def _state(self, volume: Volume) -> ExportState:
        backstore, acls, enabled = volume.backstore(), volume.acls(), volume.enabled()
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


def _translated(call: str, work: Callable[[], _T]) -> _T:
    """What the kernel or rtslib refuse as TargetRefused. Raises TargetUnavailable when LIO cannot be looked at."""
    if os.path.isdir("/sys/module/target_core_mod") and not os.path.isdir(configfs.CORE):
        raise TargetUnavailable(f"LIO runs, but {configfs.ROOT} is not mounted: its targets cannot be seen")
    try:
        return work()
    except RTSLibError as error:
        raise TargetRefused(call, 0, str(error)) from error
    except OSError as error:
        raise TargetRefused(call, error.errno or 0, str(error)) from error
