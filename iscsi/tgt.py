"""Exports by tgtd, the user-space target: layers in an order that cannot leak, a fence that holds.

Building goes target → guard → LUN → its parameters → accounts → ACL; taking down starts with the ACL. An ACL without an
account lets an initiator in without CHAP, an ACL before its LUN answers a reconnecting writer with an I/O error.

What tgtd 1.0.85 does, and what follows:

- An initiator's name or its address in the ACL is enough to log in; both cannot be demanded. So we bind names only, and
  refuse a connection with `networks`. Names compare byte by byte.
- An account belongs to a target, not to an initiator: all connections of a volume are one trust group.
- Deleting a target refuses while sessions are listed and takes the LUN along in the same step, where deleting the LUN
  first would pull it from under a session that came at that moment. So removal is that one request.
- A LUN's size is read when its file is opened: growing is closing and opening it after a drain, since a command in
  between would fail. Initiators reconnect and repeat what had no answer.
- A flush (SYNCHRONIZE CACHE) and FUA are fdatasync; the LUN reports a write-back cache, so that guests send them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from uuid import UUID

from iscsi import names, tgt_show
from iscsi.limits import THREADS_PER_LUN, check_threads
from iscsi.target import (
    Capabilities,
    Connection,
    Credentials,
    Export,
    ExportState,
    Login,
    Session,
    TargetBusy,
    TargetError,
    TargetLimit,
    TargetRefused,
    TargetUnavailable,
)
from iscsi.tgt_accounts import AccountSlots, is_filler
from iscsi.tgt_checks import check_export
from iscsi.tgt_ipc import Code, TgtIpc
from iscsi.tgt_logins import close_unfinished

_NOTHING = tgt_show.Block(lun=None, accounts=(), outgoing=None, initiators=(), addresses=())


def _no_trace(step: str) -> None:
    pass


class TgtTarget:
    """`iscsi.target.Target` on one tgtd. Targets whose name does not begin with `prefix` are never touched.

    `patience` is how many seconds a grow waits for writes in flight. `trace` is called with the name of each step done.
    """

    capabilities = Capabilities(online_grow=True, ro_per_initiator=False, mutual_chap_many=False, networks=False)

    def __init__(
        self, ipc: TgtIpc, prefix: str, *, patience: float = 30.0, trace: Callable[[str], None] = _no_trace
    ) -> None:
        self._ipc, self._prefix, self._patience, self._trace = ipc, prefix.lower(), patience, trace
        self._slots = AccountSlots(ipc, trace)

    def ensure_export(self, export: Export) -> None:
        self._converge(export, reopen=False)

    def grow(self, export: Export) -> None:
        self._converge(export, reopen=True)

    def drain(self, volume_id: UUID, keep: Collection[Login] = ()) -> list[Session]:
        tid = self._tid(volume_id)
        if tid is None:
            return []
        self._revoke(tid, self._block(volume_id, tid), keep)
        kept = {login.initiator for login in keep}
        self._end_sessions(volume_id, tid, kept)
        return self._sessions(volume_id, tid, kept) or self._unfinished(volume_id, tid)

    def remove(self, volume_id: UUID) -> None:
        tid = self._tid(volume_id)
        if tid is None:
            return
        self._require_idle(volume_id, tid)
        self._revoke(tid, self._block(volume_id, tid), ())
        if unfinished := self._unfinished(volume_id, tid):
            raise TargetBusy(volume_id, unfinished)
        try:
            self._ipc.delete_target(tid)
            self._ipc.delete_account(self._slots.guard_name(tid))
        except TargetRefused as refused:
            if refused.code in (Code.TARGET_ACTIVE, Code.LUN_ACTIVE):
                raise TargetBusy(volume_id, self._sessions(volume_id, tid)) from refused
            raise

    def sessions(self) -> list[Session]:
        return [session for volume_id, tid, _ in self._ours() for session in self._sessions(volume_id, tid)]

    def inventory(self) -> list[ExportState]:
        sections, ours = self._sections(), self._ours()
        there = ((volume_id, tid, iqn) for volume_id, tid, iqn in ours if tid in sections)
        return [_state(volume_id, tid, iqn, tgt_show.block(sections[tid])) for volume_id, tid, iqn in there]

    def altered(self, export: Export) -> list[str]:
        """tgtd tells nothing more: a secret, for one, it never tells."""
        return []

    def foreign(self) -> list[str]:
        return [iqn for _, iqn in self._names() if names.volume_of(self._prefix, iqn) is None]

    # --- building

    def _converge(self, export: Export, *, reopen: bool) -> None:
        check_export(export)
        block = self._ensure_target(export)
        if self._revoke(export.tid, block, [connection.login for connection in export.connections]):
            block = self._block(export.volume_id, export.tid)
        self._end_sessions(export.volume_id, export.tid, {c.initiator for c in export.connections})
        accounts = list(block.accounts)
        self._slots.guard(export.tid, accounts)
        standing = self._ensure_lun(export, block, reopen=reopen)
        self._ensure_accounts(export, block, accounts)
        self._bind_initiators(export, standing)

    def _ensure_target(self, export: Export) -> tgt_show.Block:
        iqn = names.target_name(self._prefix, export.volume_id)
        tid, holder = self._tid(export.volume_id), dict(self._names()).get(export.tid)
        if tid == export.tid:
            self._ipc.set_state(tid, "ready")
            return self._block(export.volume_id, tid)
        if holder is not None:
            raise TargetRefused("create target", 0, f"number {export.tid} belongs to {holder}")
        if tid is not None:
            self.remove(export.volume_id)
        self._ipc.create_target(export.tid, iqn)
        self._trace("target")
        return _NOTHING

    def _ensure_lun(self, export: Export, block: tgt_show.Block, *, reopen: bool) -> Collection[str]:
        """Returns the initiators whose right to log in was left standing."""
        lun = block.lun
        if lun is None:
            self._create_lun(export)
        elif lun.path not in (None, export.path) or lun.read_only != export.read_only:
            self._replace_lun(export, block)
            return ()
        elif not _has_identity(lun, export.volume_id) or lun.thin != _can_discard(export):
            self._set_parameters(export)
        if lun and (reopen or not lun.online or lun.path is None or not _same_size(lun, export.size)):
            self._reopen(export, block)
            return ()
        return block.initiators

    def _create_lun(self, export: Export) -> None:
        check_threads(THREADS_PER_LUN, self._ipc.peer_pid())
        try:
            self._ipc.create_lun(export.tid, export.path)
        except TargetRefused as refused:
            if refused.code == Code.NO_MEMORY:
                raise TargetLimit("threads", THREADS_PER_LUN, 0) from refused
            raise
        self._trace("lun")
        self._set_parameters(export)

    def _set_parameters(self, export: Export) -> None:
        self._ipc.update_lun(
            export.tid,
            f"scsi_id={names.naa(export.volume_id)},scsi_sn={names.serial(export.volume_id)},"
            "vendor_id=STRATUS,product_id=VOLUME,product_rev=1,"
            f"readonly={int(export.read_only)},thin_provisioning={int(_can_discard(export))}",
        )
        self._trace("parameters")

    def _replace_lun(self, export: Export, block: tgt_show.Block) -> None:
        self._require_idle(export.volume_id, export.tid)
        self._withdraw(export.tid, block.initiators)
        self._wait_idle(export.volume_id, export.tid)
        self._ipc.delete_lun(export.tid)
        self._trace("lun deleted")
        self._create_lun(export)

    def _reopen(self, export: Export, block: tgt_show.Block) -> None:
        """Open the backing anew, so that its size is read. Raises TargetBusy, with the initiators let back in."""
        self._withdraw(export.tid, block.initiators)
        self._trace("withdrawn")
        try:
            self._wait_idle(export.volume_id, export.tid)
        except TargetBusy:
            if block.lun and block.lun.online:
                self._bind_initiators(export, ())
            raise
        for parameter, step in (("online=0", "offline"), (f"path={export.path}", "path"), ("online=1", "online")):
            self._ipc.update_lun(export.tid, parameter)
            self._trace(step)
        lun = self._block(export.volume_id, export.tid).lun
        if lun is None or not _same_size(lun, export.size):
            raise TargetRefused("grow", 0, f"tgtd shows {lun.size if lun else 0} bytes, not {export.size}")

    def _ensure_accounts(self, export: Export, block: tgt_show.Block, accounts: list[str]) -> None:
        for connection in export.connections:
            if connection.credentials.username not in accounts:
                self._slots.admit(export.tid, accounts, connection.credentials)
        mutual = _mutual(export.connections)
        if mutual and block.outgoing != mutual.username:
            self._ipc.create_account(mutual.username, mutual.password)
            self._trace("mutual")
            self._ipc.bind_account(export.tid, mutual.username, outgoing=True)
            self._trace("mutual bound")

    def _bind_initiators(self, export: Export, standing: Collection[str]) -> None:
        for initiator in {connection.initiator for connection in export.connections}.difference(standing):
            self._ipc.bind_initiator(export.tid, initiator)
            self._trace("acl")

    # --- taking down

    def _revoke(self, tid: int, block: tgt_show.Block, keep: Collection[Login]) -> bool:
        """Take the right to log in from all but `keep`; says whether there was any to take."""
        initiators = set(block.initiators) - {login.initiator for login in keep}
        self._withdraw(tid, initiators, block.addresses)
        usernames = {login.username for login in keep}
        stale = [name for name in block.accounts if name not in usernames and not is_filler(name)]
        accounts = list(block.accounts)
        for username in stale:
            self._slots.dismiss(tid, accounts, username)
        mutual = {login.mutual_username for login in keep}
        outgoing = block.outgoing if block.outgoing and block.outgoing not in mutual else None
        if outgoing:
            self._ipc.unbind_account(tid, outgoing, outgoing=True)
            self._ipc.delete_account(outgoing)
        return bool(initiators or block.addresses or stale or outgoing)

    def _withdraw(self, tid: int, initiators: Iterable[str], addresses: Iterable[str] = ()) -> None:
        for address in addresses:
            self._ipc.unbind_address(tid, address)
        for initiator in initiators:
            self._ipc.unbind_initiator(tid, initiator)

    def _end_sessions(self, volume_id: UUID, tid: int, kept: Collection[str]) -> bool:
        """Tell the sessions of all but `kept` to end, which tgtd does in its own time; says whether there were any."""
        sessions = self._sessions(volume_id, tid, kept)
        for session in sessions:
            self._ipc.close_connection(tid, session.session_id, session.connection_id)
        return bool(sessions)

    def _wait_idle(self, volume_id: UUID, tid: int) -> None:
        deadline = time.monotonic() + self._patience
        while self._end_sessions(volume_id, tid, ()) or self._unfinished(volume_id, tid):
            if time.monotonic() > deadline:
                raise TargetBusy(volume_id, self._sessions(volume_id, tid))
            time.sleep(0.002)

    def _require_idle(self, volume_id: UUID, tid: int) -> None:
        if sessions := self._sessions(volume_id, tid):
            raise TargetBusy(volume_id, sessions)

    # --- looking

    def _names(self) -> list[tuple[int, str]]:
        return tgt_show.target_names(self._ipc.list_targets())

    def _ours(self) -> list[tuple[UUID, int, str]]:
        found = ((names.volume_of(self._prefix, iqn), tid, iqn) for tid, iqn in self._names())
        return [(volume_id, tid, iqn) for volume_id, tid, iqn in found if volume_id]

    def _tid(self, volume_id: UUID) -> int | None:
        return next((tid for found, tid, _ in self._ours() if found == volume_id), None)

    def _sections(self) -> dict[int, str]:
        before = self._names()
        listing = self._slots.show_targets()
        return tgt_show.sections(listing, {*before, *self._names()}, self._slots.guard_name)

    def _block(self, volume_id: UUID, tid: int) -> tgt_show.Block:
        section = self._sections().get(tid) or self._silence(volume_id, tid)
        return tgt_show.block(section)

    def _silence(self, volume_id: UUID, tid: int) -> str:
        """What is true of a target whose initiator garbles the listing: its sessions are ended to read it."""
        self._ipc.set_state(tid, "offline")
        try:
            self._wait_idle(volume_id, tid)
            section = self._sections().get(tid)
        finally:
            self._ipc.set_state(tid, "ready")
        if section is None:
            raise TargetError(f"tgtd's listing of target {tid} cannot be read")
        return section

    def _sessions(self, volume_id: UUID, tid: int, kept: Collection[str] = ()) -> list[Session]:
        listed = tgt_show.connections(self._ipc.show_connections(tid))
        return [
            Session(volume_id, initiator, address, session_id, connection_id, tid)
            for session_id, connection_id, initiator, address in listed
            if initiator not in kept
        ]

    def _unfinished(self, volume_id: UUID, tid: int) -> list[Session]:
        """Logins, to whatever target, that neither end nor can be ended (see `iscsi.tgt_logins`)."""
        try:
            addresses = close_unfinished(self._ipc.peer_pid(), self._all_connections)
        except OSError as error:  # it died, or we may not look at it: then nothing is proven
            raise TargetUnavailable(f"tgtd's connections cannot be counted: {error}") from error
        return [Session(volume_id, "", address, 0, 0, tid) for address in addresses]

    def _all_connections(self) -> set[tuple[int, int, str]]:
        listings = (tgt_show.connections(self._ipc.show_connections(tid)) for tid, _ in self._names())
        found = {(session, connection, address) for listed in listings for session, connection, _, address in listed}
        return {entry for entry in found if entry[2]}


def _has_identity(lun: tgt_show.Lun, volume_id: UUID) -> bool:
    return lun.scsi_id == names.naa(volume_id) and lun.serial == names.serial(volume_id)


def _can_discard(export: Export) -> bool:
    """tgtd punches a hole, which not every block device takes: a thin volume answers EOPNOTSUPP."""
    return export.path.is_file()


def _same_size(lun: tgt_show.Lun, size: int) -> bool:
    return tgt_show.shown(lun.size) == tgt_show.shown(size)


def _mutual(connections: Iterable[Connection]) -> Credentials | None:
    return next((connection.mutual for connection in connections if connection.mutual), None)


def _state(volume_id: UUID, tid: int, iqn: str, block: tgt_show.Block) -> ExportState:
    lun = block.lun
    usernames = frozenset(name for name in block.accounts if not is_filler(name))
    whole = lun is not None and lun.online and _has_identity(lun, volume_id)
    return ExportState(
        volume_id=volume_id,
        tid=tid,
        iqn=iqn,
        path=lun.path if lun else None,
        read_only=lun is not None and lun.read_only,
        online=lun is not None and lun.online,
        size=lun.size if lun else 0,
        initiators=frozenset(block.initiators),
        usernames=usernames,
        mutuals=frozenset([block.outgoing] if block.outgoing else []),
        networks=frozenset(block.addresses),
        complete=whole and bool(usernames) and bool(block.initiators),
    )
