"""The audit trail: who did what to which resource, chained by hash.

An event is written in the transaction of the change it tells of. The worker, and nobody else, seals events: it gives
each its place in the chain and the hash over its content and its predecessor's hash. The chain's head is signed at
intervals into a file outside the database, so that cutting off the tail shows.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db import Database
from app.ids import new_id
from app.keys import Signer
from app.models import Event

GENESIS = "0" * 64
BATCH = 500


@dataclass(frozen=True)
class Actor:
    """Who acts: a principal's name and the address the request came from."""

    name: str
    address: str | None = None


SYSTEM = Actor("system")


def record(session: Session, actor: Actor, kind: str, resource: tuple[str, UUID] | None = None, **detail: Any) -> None:
    """Add an event to the transaction. `detail` is JSON and never holds a secret."""
    resource_kind, resource_id = resource or (None, None)
    session.add(
        Event(
            id=new_id(),
            at=dt.datetime.now(dt.UTC),
            kind=kind,
            actor=actor.name,
            address=actor.address,
            resource_kind=resource_kind,
            resource_id=resource_id,
            detail=detail,
        )
    )


def digest(event: Event, sequence: int, previous: str) -> str:
    """SHA-256 over the predecessor's hash and every member of the event, as canonical JSON."""
    content = {
        "sequence": sequence,
        "previous": previous,
        "id": str(event.id),
        "at": event.at.astimezone(dt.UTC).isoformat(timespec="microseconds"),
        "kind": event.kind,
        "actor": event.actor,
        "address": event.address,
        "resource_kind": event.resource_kind,
        "resource_id": str(event.resource_id) if event.resource_id else None,
        "detail": event.detail,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(database: Database) -> int:
    """Chain up to BATCH events that have no place yet; how many. Called by the one worker only."""
    with database.read() as session:
        if session.scalar(select(Event.id).where(Event.sequence.is_(None)).limit(1)) is None:
            return 0
    with database.write() as session:
        head = session.scalars(
            select(Event).where(Event.sequence.is_not(None)).order_by(Event.sequence.desc()).limit(1)
        ).first()
        sequence, previous = (head.sequence or 0, head.hash or GENESIS) if head else (0, GENESIS)
        waiting = session.scalars(select(Event).where(Event.sequence.is_(None)).order_by(Event.id).limit(BATCH)).all()
        for event in waiting:
            sequence += 1
            event.sequence, event.previous = sequence, previous
            event.hash = previous = digest(event, sequence, previous)
        return len(waiting)


def sign_head(database: Database, signer: Signer, heads: Path) -> bool:
    """Append the signed head of the chain to the file `heads`, unless it is there already."""
    with database.read() as session:
        head = session.execute(
            select(Event.sequence, Event.hash)
            .where(Event.sequence.is_not(None))
            .order_by(Event.sequence.desc())
            .limit(1)
        ).first()
    last = None
    for last in read_heads(heads):  # noqa: B007 (only the last one matters)
        pass
    if head is None or (last and last["sequence"] == head.sequence):
        return False
    document = {"sequence": head.sequence, "hash": head.hash, "at": dt.datetime.now(dt.UTC).isoformat()}
    line = json.dumps(document | {"key": signer.public, "signature": signer.sign(_signed(document))})
    with heads.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _signed(head: dict[str, Any]) -> bytes:
    return f"{head['sequence']}:{head['hash']}:{head['at']}".encode()


def read_heads(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


@dataclass(frozen=True)
class Verdict:
    """What a check of the chain found: `broken` says where, and is None when everything holds."""

    sealed: int
    unsealed: int
    heads: int
    broken: str | None = None


def verify(database: Database, heads_file: Path, public_key: str | None = None) -> Verdict:
    """Recompute the whole chain and compare it with every signed head.

    `public_key` (base64) is the one the heads must be signed with; left out, each head's own key is believed, which
    proves order but not origin.
    """
    heads = {head["sequence"]: head for head in read_heads(heads_file)}
    bad = next((h for h in heads.values() if not _signature_holds(h, public_key)), None)
    if bad:
        return Verdict(0, 0, len(heads), f"the signature of head {bad['sequence']} in {heads_file} does not hold")
    previous, count = GENESIS, 0
    with database.read() as session:
        unsealed = len(session.scalars(select(Event.id).where(Event.sequence.is_(None))).all())
        chain = session.scalars(
            select(Event).where(Event.sequence.is_not(None)).order_by(Event.sequence).execution_options(yield_per=BATCH)
        )
        for count, event in enumerate(chain, start=1):
            broken = _broken(event, count, previous, heads.get(count))
            if broken:
                return Verdict(count - 1, unsealed, len(heads), broken)
            previous = event.hash or ""
    beyond = [sequence for sequence in heads if sequence > count]
    broken = (
        f"the chain ends at {count}, but a head was signed at {max(beyond)}: its tail was cut off" if beyond else None
    )
    return Verdict(count, unsealed, len(heads), broken)


def _broken(event: Event, expected: int, previous: str, head: dict[str, Any] | None) -> str | None:
    if event.sequence != expected:
        return f"event {expected} is missing (the next one is {event.sequence})"
    if event.previous != previous or event.hash != digest(event, expected, previous):
        return f"event {expected} ({event.id}, {event.kind}) was changed"
    if head is not None and head["hash"] != event.hash:
        return f"event {expected} is not the one whose hash was signed at {head['at']}"
    return None


def _signature_holds(head: dict[str, Any], public_key: str | None) -> bool:
    if public_key is not None and head["key"] != public_key:
        return False
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(head["key"]))
    try:
        key.verify(base64.b64decode(head["signature"]), _signed(head))
    except InvalidSignature:
        return False
    return True
