"""The audit trail: written with the change, sealed in a chain, its head signed outside the database."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update

from app import events
from app.db import Database
from app.events import SYSTEM, Actor, Verdict, record, seal, sign_head, verify
from app.ids import new_id
from app.keys import Signer
from app.models import Event


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    return tmp_path / "heads.jsonl"


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer.load_or_create(tmp_path / "events.key")


def write(database: Database, count: int, kind: str = "volume.create") -> None:
    with database.write() as session:
        for number in range(count):
            record(session, Actor("alice", "10.0.0.9"), kind, ("volume", new_id()), size=number, name="Größe ✓")


def chain(database: Database, heads: Path, signer: Signer, count: int = 10) -> None:
    write(database, count)
    assert seal(database) == count
    assert sign_head(database, signer, heads)


def test_an_event_says_who_did_what_to_which_resource_from_where(database: Database) -> None:
    volume = new_id()
    with database.write() as session:
        record(session, Actor("alice", "10.0.0.9"), "volume.delete", ("volume", volume), size=7, name=None)
        record(session, SYSTEM, "pool.active", pool="default")
    with database.read() as session:
        first, second = session.scalars(select(Event).order_by(Event.id))
    assert (first.actor, first.address, first.kind) == ("alice", "10.0.0.9", "volume.delete")
    assert (first.resource_kind, first.resource_id, first.detail) == ("volume", volume, {"size": 7, "name": None})
    assert (second.actor, second.address, second.resource_id) == ("system", None, None)


def test_an_event_is_rolled_back_with_its_change(database: Database) -> None:
    def fail_after_telling() -> None:
        with database.write() as session:
            record(session, SYSTEM, "pool.active")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_telling()
    assert seal(database) == 0


def test_a_chain_holds_and_its_parts_are_counted(database: Database, heads: Path, signer: Signer) -> None:
    assert verify(database, heads) == Verdict(0, 0, 0)
    assert not sign_head(database, signer, heads)
    chain(database, heads, signer, 10)
    chain(database, heads, signer, 5)
    write(database, 2)
    assert verify(database, heads, signer.public) == Verdict(15, 2, 2)
    assert not sign_head(database, signer, heads)  # signed already


def test_sealing_goes_in_batches_in_the_order_of_the_events(database: Database, heads: Path) -> None:
    write(database, events.BATCH + 3)
    assert [seal(database), seal(database), seal(database)] == [events.BATCH, 3, 0]
    with database.read() as session:
        found = session.execute(select(Event.id, Event.sequence).order_by(Event.id)).all()
    assert [sequence for _, sequence in found] == list(range(1, events.BATCH + 4))
    assert verify(database, heads).broken is None


def test_many_write_while_one_seals(database: Database, heads: Path, signer: Signer) -> None:
    stop = threading.Event()

    def sealer() -> None:
        while not stop.is_set():
            seal(database)
            sign_head(database, signer, heads)

    thread = threading.Thread(target=sealer)
    thread.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write(database, 3), range(40)))
    stop.set()
    thread.join()
    while seal(database):
        pass
    verdict = verify(database, heads, signer.public)
    assert (verdict.sealed, verdict.unsealed, verdict.broken) == (120, 0, None)
    assert verdict.heads >= 1


def _forge(database: Database, sequence: int) -> None:
    """Change an event and compute the whole chain anew from there, as who owns the database can."""
    with database.write() as session:
        rows = session.scalars(select(Event).order_by(Event.sequence)).all()
        rows[sequence - 1].actor = "mallory"
        previous = events.GENESIS
        for number, event in enumerate(rows, start=1):
            event.previous = previous
            event.hash = previous = events.digest(event, number, previous)


def _change(**values: object) -> Callable[[Database], None]:
    def tamper(database: Database) -> None:
        with database.write() as session:
            session.execute(update(Event).where(Event.sequence == 5).values(**values))

    return tamper


def _remove(sequences: list[int], *, close_the_gap: bool = False) -> Callable[[Database], None]:
    def tamper(database: Database) -> None:
        with database.write() as session:
            session.execute(delete(Event).where(Event.sequence.in_(sequences)))
            if close_the_gap:
                for event in session.scalars(
                    select(Event).where(Event.sequence > max(sequences)).order_by(Event.sequence)
                ):
                    assert event.sequence is not None
                    event.sequence -= len(sequences)
                    session.flush()

    return tamper


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (_change(actor="mallory"), "event 5 .*was changed"),
        (_change(address=None), "event 5 .*was changed"),
        (_change(kind="volume.list"), "event 5 .*was changed"),
        (_change(detail={"size": 4, "name": "other"}), "event 5 .*was changed"),
        (_change(resource_id=None), "event 5 .*was changed"),
        (_change(previous="0" * 64), "event 5 .*was changed"),
        (_change(hash="0" * 64), "event 5 .*was changed"),
        (_remove([5]), "event 5 is missing"),
        (_remove([5], close_the_gap=True), "event 5 .*was changed"),
        (_remove([1]), "event 1 is missing"),
        (_remove([9, 10]), "the chain ends at 8, but a head was signed at 10: its tail was cut off"),
        (_remove(list(range(1, 11))), "the chain ends at 0"),
        (lambda database: _forge(database, 5), "event 10 is not the one whose hash was signed"),
    ],
)
def test_tampering_shows(
    database: Database, heads: Path, signer: Signer, tamper: Callable[[Database], None], found: str
) -> None:
    chain(database, heads, signer)
    tamper(database)
    verdict = verify(database, heads, signer.public)
    assert verdict.broken is not None
    with pytest.raises(AssertionError, match=found):
        raise AssertionError(verdict.broken)


def test_heads_of_another_key_prove_nothing(database: Database, heads: Path, signer: Signer, tmp_path: Path) -> None:
    """Who owns the database and the file can sign anew, but only with a key of their own."""
    chain(database, heads, signer)
    _forge(database, 5)
    heads.unlink()
    mallory = Signer.load_or_create(tmp_path / "mallory.key")
    assert sign_head(database, mallory, heads)
    assert verify(database, heads).broken is None
    assert "line 1 " in str(verify(database, heads, signer.public).broken)


def test_a_second_head_of_one_place_does_not_hide_the_first(
    database: Database, heads: Path, signer: Signer, tmp_path: Path
) -> None:
    chain(database, heads, signer)
    _forge(database, 5)
    forged = tmp_path / "forged.jsonl"
    assert sign_head(database, Signer.load_or_create(tmp_path / "mallory.key"), forged)
    with heads.open("a") as file:
        file.write(forged.read_text())
    assert "event 10 is not the one" in str(verify(database, heads).broken)


@pytest.mark.parametrize("member", ["sequence", "hash", "at", "key", "signature"])
@pytest.mark.parametrize("value", [None, "", "AAAA", 3])
def test_a_head_that_was_changed_shows(
    database: Database, heads: Path, signer: Signer, member: str, value: object
) -> None:
    chain(database, heads, signer)
    head = json.loads(heads.read_text())
    heads.write_text(json.dumps(head | {member: value}) + "\n")
    assert "line 1 " in str(verify(database, heads, signer.public).broken)


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b"{}\n", b"\xff\xfe\n"])
def test_a_line_that_is_no_head_shows(database: Database, heads: Path, signer: Signer, line: bytes) -> None:
    chain(database, heads, signer)
    with heads.open("ab") as file:
        file.write(line)
    assert "line 2 " in str(verify(database, heads).broken)


def test_a_line_cut_by_a_power_failure_is_no_tampering_and_is_replaced(
    database: Database, heads: Path, signer: Signer
) -> None:
    chain(database, heads, signer)
    whole = heads.read_bytes()
    with heads.open("ab") as file:
        file.write(whole[: len(whole) // 2])
    assert verify(database, heads, signer.public) == Verdict(10, 0, 1)
    chain(database, heads, signer, 3)
    assert verify(database, heads, signer.public) == Verdict(13, 0, 2)
    assert heads.read_bytes().startswith(whole)


def test_the_last_head_is_found_in_a_long_file(database: Database, heads: Path, signer: Signer) -> None:
    for _ in range(30):
        chain(database, heads, signer, 1)
    assert heads.stat().st_size > events.LONGEST_HEAD
    assert not sign_head(database, signer, heads)
    assert verify(database, heads, signer.public) == Verdict(30, 0, 30)
