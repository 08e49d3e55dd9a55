"""Many callers at once on one volume, with a worker at work: no rule is ever broken, and nothing stays half-way."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from app import attachments, operations, snapshots, volumes
from app.auth import Caller
from app.db import Database
from app.errors import Problem
from app.models import Attachment, Operation, Snapshot, Volume
from app.schemas import AttachmentCreate, SnapshotCreate, VolumeCreate, VolumeUpdate
from tests.support import invariants
from tests.support.house import House, open_house
from tests.support.rows import MIB


@pytest.fixture
def house(tmp_path: Path, database: Database) -> Iterator[House]:
    with open_house(tmp_path / "home", database, attachments={"direct": True}) as opened:
        opened.start()
        yield opened


@pytest.fixture
def alice(house: House) -> Caller:
    return house.caller("alice")


def make_volume(house: House, owner: Caller, size: int = 16 * MIB) -> UUID:
    made = house.ended(house.do(volumes.create, house.settings, owner, VolumeCreate(size=size)))
    assert made.state == "succeeded", made.error_detail
    return made.resource_id


def wish(number: int, mode: str = "rw") -> AttachmentCreate:
    name = f"iqn.2026-11.org.example:i{number}"
    return AttachmentCreate(instance_id="i", node="n", initiator=name, mode="rw" if mode == "rw" else "ro")


def attach(house: House, caller: Caller, volume: UUID, body: AttachmentCreate) -> Operation:
    return house.do(attachments.attach, house.settings, house.keys, caller, volume, body)


def all_at_once(calls: list[Callable[[], object]]) -> list[str]:
    """Start the calls in the same moment; "done", or the code of the refusal, of each. Busy is tried again."""
    barrier = threading.Barrier(len(calls))

    def outcome(call: Callable[[], object]) -> str:
        barrier.wait()
        for _ in range(5):
            try:
                call()
                return "done"
            except Problem as problem:
                return problem.code
            except OperationalError:
                continue
        return "busy"

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def test_of_fifty_writers_at_once_one_gets_the_volume(house: House, alice: Caller) -> None:
    volume = make_volume(house, alice)
    outcomes = all_at_once([lambda n=n: attach(house, alice, volume, wish(n)) for n in range(50)])  # type: ignore[misc]
    assert Counter(outcomes) == {"done": 1, "volume-in-use": 49}
    house.settle()
    invariants.check(house.database, idle=True)
    (export,) = house.target.inventory()
    with house.database.read() as session:
        (attachment,) = session.scalars(select(Attachment)).all()
    assert attachment.state == "attached"
    assert set(export.initiators) == {attachment.initiator}


def test_of_writers_and_readers_at_once_either_one_writes_or_only_readers_read(house: House, alice: Caller) -> None:
    volume = make_volume(house, alice)
    wishes = [wish(n, "rw" if n % 2 else "ro") for n in range(30)]
    outcomes = all_at_once([lambda w=w: attach(house, alice, volume, w) for w in wishes])  # type: ignore[misc]
    winners = [w.mode for w, outcome in zip(wishes, outcomes, strict=True) if outcome == "done"]
    assert winners in (["rw"], ["ro"] * 15)
    assert set(outcomes) == {"done", "volume-in-use"}
    house.settle()
    invariants.check(house.database, idle=True)


def test_a_quota_is_not_passed_by_many_at_once(house: House) -> None:
    poor = house.caller("poor", quota_size=5 * MIB, quota_count=100)
    body = VolumeCreate(size=MIB)
    make: Callable[[], object] = lambda: house.do(volumes.create, house.settings, poor, body)  # noqa: E731
    outcomes = all_at_once([make] * 20)
    assert Counter(outcomes) == {"done": 5, "quota-exceeded": 15}
    house.settle()
    invariants.check(house.database, idle=True)


def test_a_grow_beside_a_copy_charges_what_there_is(house: House, alice: Caller) -> None:
    """Sizes are read again once the row is locked: what was found before may have grown meanwhile."""
    volume = make_volume(house, alice, MIB)
    for size in range(2, 14):
        grow = VolumeUpdate(size=size * MIB)
        calls: list[Callable[[], object]] = [
            lambda grow=grow: house.do(volumes.update_record, house.settings, alice, volume, grow, None),  # type: ignore[misc]
            lambda grow=grow: house.do(volumes.update_record, house.settings, alice, volume, grow, None),  # type: ignore[misc]
            lambda: house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate()),
            lambda: house.do(volumes.create, house.settings, alice, VolumeCreate(volume=volume)),
        ]
        assert set(all_at_once(calls)) <= {"done", "volume-busy", "shrink-refused", "size-too-small"}
        invariants.check(house.database)
    house.settle()
    invariants.check(house.database, idle=True)
    with house.database.read() as session:
        assert {v.state for v in session.scalars(select(Volume))} == {"available"}
        for copy in [*session.scalars(select(Volume)), *session.scalars(select(Snapshot))]:
            assert backing_size(house, copy) == copy.size


def backing_size(house: House, record: Volume | Snapshot) -> int:
    items = {item.id: item.size for item in house.outside.pools[record.pool].inventory()}
    return items[record.id]


@pytest.mark.parametrize("seed", [1, 2])
def test_everything_at_once_on_one_volume_breaks_no_rule(house: House, alice: Caller, seed: int) -> None:
    dice = random.Random(seed)
    volume = make_volume(house, alice)
    snapshot = house.ended(house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate())).resource_id
    seen: Counter[str] = Counter()
    for turn in range(6):
        volume, snapshot = _present(house, alice, volume, snapshot)
        calls = _calls(house, alice, volume, snapshot, turn)
        dice.shuffle(calls)
        seen.update(all_at_once(calls))
        invariants.check(house.database)
        house.settle()
        invariants.check(house.database, idle=True)
        _detach_all(house, alice)
    assert seen["done"] > 6
    assert "busy" not in seen
    with house.database.read() as session:
        failed = session.scalars(select(Operation).where(Operation.state == "failed")).all()
        assert [(o.kind, o.error_detail) for o in failed] == []
    assert house.target.inventory() == []


def _present(house: House, alice: Caller, volume: UUID, snapshot: UUID) -> tuple[UUID, UUID]:
    """Them, or new ones where the turn before has deleted them."""
    with house.database.read() as session:
        if session.get(Volume, volume) is not None and session.get(Snapshot, snapshot) is not None:
            return volume, snapshot
    volume = make_volume(house, alice)
    return volume, house.ended(house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate())).resource_id


def _calls(house: House, alice: Caller, volume: UUID, snapshot: UUID, turn: int) -> list[Callable[[], object]]:
    settings, do = house.settings, house.do
    grow = VolumeUpdate(size=(17 + turn) * MIB)
    return [
        *(lambda n=n: attach(house, alice, volume, wish(n)) for n in range(3)),
        *(lambda n=n: attach(house, alice, volume, wish(n, "ro")) for n in range(3, 6)),
        lambda: _attach_and_detach(house, alice, volume, 6),
        lambda: _attach_and_detach(house, alice, volume, 7),
        lambda: do(snapshots.create, settings, alice, volume, SnapshotCreate()),
        lambda: do(volumes.create, settings, alice, VolumeCreate(volume=volume)),
        lambda: do(volumes.create, settings, alice, VolumeCreate(snapshot=snapshot)),
        lambda: do(volumes.revert, alice, volume, snapshot),
        lambda: do(volumes.update_record, settings, alice, volume, grow, None),
        lambda: do(volumes.update_record, settings, alice, volume, VolumeUpdate(name=f"turn-{turn}"), None),
        lambda: do(snapshots.request_delete, alice, snapshot, None),
        *([lambda: do(volumes.request_delete, alice, volume, None)] if turn % 2 else []),
        lambda: _copy_and_cancel(house, alice, volume),
    ]


def _attach_and_detach(house: House, alice: Caller, volume: UUID, number: int) -> None:
    made = attach(house, alice, volume, wish(number, "ro"))
    house.do(lambda session: attachments.detach(session, alice, made.resource_id, force=False))


def _copy_and_cancel(house: House, alice: Caller, volume: UUID) -> None:
    made = house.do(volumes.create, house.settings, alice, VolumeCreate(volume=volume))
    house.do(operations.cancel, alice, made.id)


def _detach_all(house: House, alice: Caller) -> None:
    with house.database.read() as session:
        held = session.scalars(select(Attachment.id).where(Attachment.held_mode.is_not(None))).all()
    for identifier in held:
        house.do(lambda session, identifier=identifier: attachments.detach(session, alice, identifier, force=False))
    house.settle()
    invariants.check(house.database, idle=True)
