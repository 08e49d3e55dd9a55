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
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from app.db import Database
from app.ids import new_id
from app.keys import Signer
from app.models import Event

GENESIS = "0" * 64
BATCH = 500
#: A signed head is a line of about 300 bytes.
LONGEST_HEAD = 4096


@dataclass(frozen=True)
class Actor:
    """Who acts: a principal's name and the address the request came from."""

    name: str
    address: str | None = None


SYSTEM = Actor("system")


#: Every change records one, so it is not made an object first.
_RECORD = insert(Event.metadata.tables[Event.__tablename__])


def record(session: Session, actor: Actor, kind: str, resource: tuple[str, UUID] | None = None, **detail: Any) -> None:
    """Add an event to the transaction. `detail` is JSON and never holds a secret."""
    resource_kind, resource_id = resource or (None, None)
    event = {
        "id": new_id(),
        "at": dt.datetime.now(dt.UTC),
        "kind": kind,
        "actor": actor.name,
        "address": actor.address,
        "resource_kind": resource_kind,
        "resource_id": resource_id,
        "detail": detail,
    }
    session.execute(_RECORD, event)


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
    """Append the signed head of the chain to the file `heads`, unless it is there. Called by one worker only."""
    with database.read() as session:
        head = session.execute(
            select(Event.sequence, Event.hash)
            .where(Event.sequence.is_not(None))
            .order_by(Event.sequence.desc())
            .limit(1)
        ).first()
    if head is None:
        return False
    with heads.open("a+b") as file:
        if _last_signed(file) == head.sequence:
            return False
        document = {"sequence": head.sequence, "hash": head.hash, "at": dt.datetime.now(dt.UTC).isoformat()}
        line = json.dumps(document | {"key": signer.public, "signature": signer.sign(_signed(document))})
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def _last_signed(file: BinaryIO) -> int | None:
    """The sequence in the last line; what a power cut left of a line after it is cut off."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LONGEST_HEAD))
    tail = file.read()
    whole = tail[: tail.rfind(b"\n") + 1]
    file.truncate(size - len(tail) + len(whole))
    return json.loads(whole.splitlines()[-1])["sequence"] if whole else None


def _signed(head: dict[str, Any]) -> bytes:
    return f"{head['sequence']}:{head['hash']}:{head['at']}".encode()


def _read_heads(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete line; an empty document for one that is no JSON object."""
    if path.exists():
        with path.open("rb") as file:
            yield from (_parsed(line) for line in file if line.endswith(b"\n"))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Verdict:
    """What a check of the chain found: `broken` says where, and is None when everything holds."""

    sealed: int
    unsealed: int
    heads: int
    broken: str | None = None


def verify(database: Database, heads_file: Path, *public_keys: str) -> Verdict:
    """Recompute the whole chain and compare it with every signed head.

    `public_keys` (base64) are those the heads may be signed with; with none given, each head's own key is believed,
    which proves order but not origin.
    """
    heads = list(_read_heads(heads_file))
    for line, head in enumerate(heads, start=1):
        if not _signature_holds(head, public_keys):
            return Verdict(0, 0, len(heads), f"the signature in line {line} of {heads_file} does not hold")
    signed: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for head in heads:
        signed[head["sequence"]].append(head)
    previous, count = GENESIS, 0
    with database.read() as session:
        unsealed = len(session.scalars(select(Event.id).where(Event.sequence.is_(None))).all())
        chain = session.scalars(
            select(Event).where(Event.sequence.is_not(None)).order_by(Event.sequence).execution_options(yield_per=BATCH)
        )
        for count, event in enumerate(chain, start=1):
            broken = _broken(event, count, previous, signed.get(count, []))
            if broken:
                return Verdict(count - 1, unsealed, len(heads), broken)
            previous = event.hash or ""
    beyond = [sequence for sequence in signed if sequence > count]
    broken = (
        f"the chain ends at {count}, but a head was signed at {max(beyond)}: its tail was cut off" if beyond else None
    )
    return Verdict(count, unsealed, len(heads), broken)


def _broken(event: Event, expected: int, previous: str, heads: list[dict[str, Any]]) -> str | None:
    if event.sequence != expected:
        return f"event {expected} is missing (the next one is {event.sequence})"
    if event.previous != previous or event.hash != digest(event, expected, previous):
        return f"event {expected} ({event.id}, {event.kind}) was changed"
    other = next((head for head in heads if head["hash"] != event.hash), None)
    return f"event {expected} is not the one whose hash was signed at {other['at']}" if other else None


def _signature_holds(head: dict[str, Any], public_keys: Collection[str]) -> bool:
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(head["key"]))
        key.verify(base64.b64decode(head["signature"]), _signed(head))
    except (InvalidSignature, KeyError, TypeError, ValueError):
        return False
    return not public_keys or head["key"] in public_keys
