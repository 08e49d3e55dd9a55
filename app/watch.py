"""Sessions that should not be: an alarm, and then the fence.

A connection used from two places is a stolen secret or a cloned machine. Only a surplus seen in two looks in a row is
fenced, since a reconnecting initiator is listed twice for a moment; a session from a network that the connection was
not given is fenced at once (the target cannot ask for name *and* address, so this look is what enforces it).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, select, true

from app import attachments
from app.events import SYSTEM, record
from app.models import Attachment, Connection
from app.outside import Outside
from iscsi.target import Session as TargetSession

Key = tuple[UUID, str]


class SessionWatch:
    """Remembers which connections had too many sessions at the last look."""

    def __init__(self) -> None:
        self._suspects: set[Key] = set()

    def look(self, outside: Outside) -> None:
        sessions: dict[Key, list[TargetSession]] = defaultdict(list)
        for session in outside.target.sessions():
            sessions[session.volume_id, session.initiator].append(session)
        allowed = outside.settings.attachments.max_sessions
        surplus = {key for key, found in sessions.items() if key[1] and len(found) > allowed}
        surplus |= self._hidden(outside, sessions)
        for key in surplus:
            addresses = sorted({found.address for found in sessions[key]} - {""})  # a hidden session has none
            detail = {"sessions": len(sessions[key]), "addresses": addresses}
            self._alarm(outside, key, "attachment.too-many-sessions", detail, fence=key in self._suspects)
        for key, address in self._strangers(outside, sessions):
            self._alarm(outside, key, "attachment.foreign-network", {"address": address}, fence=True)
        self._suspects = surplus

    def _hidden(self, outside: Outside, sessions: dict[Key, list[TargetSession]]) -> set[Key]:
        """Volumes with sessions that the target only counts, and more in all than their attachments should have."""
        if not outside.target.capabilities.hides_sessions:
            return set()
        allowed = outside.settings.attachments.max_sessions
        totals = Counter(session.volume_id for found in sessions.values() for session in found)
        query = select(func.count()).where(Attachment.state == "attached")
        with outside.database.read() as session:
            return {
                key
                for key in sessions
                if not key[1] and totals[key[0]] > allowed * (session.scalar(query.where(_of(key))) or 0)
            }

    def _strangers(self, outside: Outside, sessions: dict[Key, list[TargetSession]]) -> Iterator[tuple[Key, str]]:
        query = select(Attachment.volume_id, Connection.initiator, Connection.networks).join(Attachment)
        with outside.database.read() as session:
            allowed = {(row.volume_id, row.initiator): row.networks for row in session.execute(query) if row.networks}
        for key, networks in allowed.items():
            for found in sessions.get(key, ()):
                if found.address and not any(ip_address(found.address) in ip_network(network) for network in networks):
                    yield key, found.address

    def _alarm(self, outside: Outside, key: Key, kind: str, detail: dict[str, object], *, fence: bool) -> None:
        with outside.database.write() as session:
            for attachment in session.scalars(select(Attachment).where(_of(key), Attachment.state == "attached")).all():
                record(session, SYSTEM, kind, ("attachment", attachment.id), volume=str(key[0]), **detail)
                if fence:
                    attachments.revoke(session, attachment, kind)


def _of(key: Key) -> ColumnElement[bool]:
    """The attachment of an initiator; all of the volume's, when it is not known whose session it is."""
    volume_id, initiator = key
    whose = Attachment.initiator == initiator if initiator else true()
    return and_(Attachment.volume_id == volume_id, whose)
