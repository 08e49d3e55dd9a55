"""Sessions: how they are counted and seen, and how they are ended without waiting for it.

The number of a target's sessions (fabric_statistics/iscsi_instance/sessions) is the truth: the kernel counts a session
until the last of its writes is over. An ACL's `info` shows one session of that initiator, the latest, however many it
has; when that one is gone it may show none while another still writes. `info` holds the initiator's alias, free text
from the network that may contain line feeds, so only what comes after it is believed.
"""

from __future__ import annotations

import re

from iscsi.lio_configfs import Volume, read
from iscsi.lio_errands import Errands
from iscsi.target import Session

_DEPTHS = ("64", "63")
_PATIENCE = 0.25  # seconds; a session without a write in flight ends within a few milliseconds
_CONNECTIONS = "[iSCSI Connections]"
_ID = re.compile(r"^LIO Session ID: (\d+) ", re.MULTILINE)
_CONNECTION = re.compile(r"CID: (\d+)\b")
_ADDRESS = re.compile(r"^\s*Address (\S+) ", re.MULTILINE)


def count(volume: Volume) -> int:
    """How many sessions the volume has, those included that end as soon as their last write is over."""
    return int(read(f"{volume.target}/fabric_statistics/iscsi_instance/sessions") or 0)


def sessions_of(volume: Volume) -> list[Session]:
    """All sessions on a volume. Those that LIO counts but does not show have no address and the session number 0, and
    no initiator if the volume has several ACLs."""
    counted = count(volume)
    if not counted:
        return []
    tid, initiators = volume.tid(), volume.initiators()
    shown = [session for initiator in initiators if (session := _shown(volume, initiator, tid))]
    owner = initiators[0] if len(initiators) == 1 else ""
    hidden = range(1, counted - len(shown) + 1)
    return shown + [Session(volume.id, owner, "", 0, number, tid) for number in hidden]


def _shown(volume: Volume, initiator: str, tid: int) -> Session | None:
    before, found, after = read(f"{volume.acl_path(initiator)}/info").rpartition(_CONNECTIONS)
    if not found:
        return None
    session, connection, address = _ID.findall(before), _CONNECTION.search(after), _ADDRESS.search(after)
    return Session(
        volume_id=volume.id,
        initiator=initiator,
        address=address[1] if address else "",
        session_id=int(session[-1]) if session else 0,
        connection_id=int(connection[1]) if connection else 0,
        tid=tid,
    )


def end_sessions(acl_path: str, errands: Errands) -> None:
    """End all sessions of an initiator; those that have nothing in flight are over when this returns.

    Changing the depth of the queue does it (core_tpg_set_initiator_node_queue_depth), and waits for the last of their
    writes. Unlike deleting the ACL it leaves the directories unlocked meanwhile; only other changes to the volume's
    portal group wait.
    """
    depth = _DEPTHS[read(f"{acl_path}/cmdsn_depth") == _DEPTHS[0]]
    errands.run(acl_path, [("write", acl_path, "cmdsn_depth", depth)], _PATIENCE)
