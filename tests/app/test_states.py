"""States change only along the table's ways, and the schema refuses what must never be true."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.db import Database
from app.ids import new_id
from app.models import Attachment, Image, Operation, Snapshot, Volume
from app.states import TRANSITIONS, Stateful, transition
from tests.support import rows

STATES: dict[Stateful, tuple[str, ...]] = {model: tuple(model.__table__.c.state.type.enums) for model in TRANSITIONS}  # type: ignore[attr-defined]
ATTEMPTS = [(model, state) for model, states in STATES.items() for state in states]


class Rows:
    """An owner, a pool, and what tests add to them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.alice = rows.user()
        with database.write() as session:
            session.add_all([self.alice, rows.pool()])
        self._tid = 1000

    def volume(self, **values: Any) -> Volume:
        self._tid += 1
        return self._added(rows.volume(self.alice.id, self._tid, **values))

    def attachment(self, volume: Volume, mode: str = "rw", **values: Any) -> Attachment:
        return self._added(rows.attachment(self.alice.id, volume.id, mode, **values))

    def of(self, model: Stateful, state: str) -> UUID:
        """A row of that kind in that state."""
        if model is Volume:
            return self.volume(state=state).id
        if model is Snapshot:
            return self._added(rows.snapshot(self.alice.id, new_id(), state=state)).id
        if model is Image:
            return self._added(rows.image(self.alice.id, state=state)).id
        if model is Operation:
            return self._added(rows.operation(new_id(), state=state)).id
        held = None if state == "detached" else "rw"
        return self.attachment(self.volume(held_mode=held), state=state, held_mode=held).id

    def _added(self, row: Any) -> Any:
        with self.database.write() as session:
            session.add(row)
        return row


@pytest.fixture
def there(database: Database) -> Rows:
    return Rows(database)


# ---------------------------------------------------------------- transitions


@pytest.mark.parametrize(("model", "start"), ATTEMPTS, ids=lambda v: getattr(v, "__name__", v))
def test_one_step_goes_where_the_table_says_and_nowhere_else(there: Rows, model: Stateful, start: str) -> None:
    for to in STATES[model]:
        identifier = there.of(model, start)
        allowed = start in TRANSITIONS[model].get(to, ())
        if to not in TRANSITIONS[model]:
            with pytest.raises(KeyError), there.database.write() as session:
                transition(session, model, identifier, to)
            continue
        held = {"held_mode": None} if to == "detached" else {}
        with there.database.write() as session:
            assert transition(session, model, identifier, to, **held) == allowed
        with there.database.read() as session:
            assert session.get_one(model, identifier).state == (to if allowed else start)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=st.sampled_from(list(TRANSITIONS)), data=st.data())
def test_any_walk_stays_on_the_ways(there: Rows, model: Stateful, data: st.DataObject) -> None:
    state = data.draw(st.sampled_from(STATES[model]))
    identifier = there.of(model, state)
    for to in data.draw(st.lists(st.sampled_from([s for s in STATES[model] if s in TRANSITIONS[model]]), max_size=8)):
        held = {"held_mode": None} if to == "detached" else {}
        with there.database.write() as session:
            moved = transition(session, model, identifier, to, **held)
        assert moved == (state in TRANSITIONS[model][to])
        state = to if moved else state
        with there.database.read() as session:
            assert session.get_one(model, identifier).state == state


def test_a_transition_counts_the_version_up_once_and_can_be_narrowed(there: Rows) -> None:
    identifier = there.volume().id
    with there.database.write() as session:
        assert not transition(session, Volume, identifier, "deleting", only_from=("error",))
        assert not transition(session, Volume, identifier, "deleting", Volume.readers > 0)
        assert not transition(session, Volume, new_id(), "deleting")
    with there.database.write() as session:
        assert transition(session, Volume, identifier, "error", error="why")
    with there.database.read() as session:
        found = session.get_one(Volume, identifier)
    assert (found.state, found.error, found.version) == ("error", "why", 2)


def test_of_many_at_once_one_makes_the_transition(there: Rows) -> None:
    identifier = there.volume().id
    barrier = threading.Barrier(20)

    def attempt(_: int) -> bool:
        barrier.wait()
        with there.database.write() as session:
            return transition(session, Volume, identifier, "deleting")

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(attempt, range(20))) == 1


def test_every_state_can_be_reached_and_every_named_state_exists() -> None:
    starts = {
        Volume: "creating",
        Snapshot: "creating",
        Attachment: "attaching",
        Image: "receiving",
        Operation: "queued",
    }
    for model, ways in TRANSITIONS.items():
        assert set(ways) | {starts[model]} == set(STATES[model])
        assert {source for sources in ways.values() for source in sources} <= set(STATES[model])


def test_what_has_ended_stays_ended() -> None:
    for model, ended in (
        (Attachment, "detached"),
        (Operation, "succeeded"),
        (Operation, "failed"),
        (Operation, "cancelled"),
    ):
        assert not [to for to, sources in TRANSITIONS[model].items() if ended in sources]


# ---------------------------------------------------------------- what the schema refuses


def refused(there: Rows, write: Callable[[Session], object]) -> None:
    with pytest.raises(IntegrityError), there.database.write() as session:
        write(session)


def test_a_second_writer_cannot_be_written_down(there: Rows) -> None:
    volume = there.volume(held_mode="rw", state="in-use")
    there.attachment(volume)
    refused(there, lambda s: s.add(rows.attachment(there.alice.id, volume.id)))


@pytest.mark.parametrize(("held", "other"), [("rw", "ro"), ("ro", "rw")])
def test_a_reader_beside_a_writer_cannot_be_written_down(there: Rows, held: str, other: str) -> None:
    volume = there.volume(held_mode=held, state="in-use")
    there.attachment(volume, held)
    refused(there, lambda s: s.add(rows.attachment(there.alice.id, volume.id, other)))
    refused(there, lambda s: s.execute(update(Volume).where(Volume.id == volume.id).values(held_mode=other)))
    refused(there, lambda s: s.execute(update(Volume).where(Volume.id == volume.id).values(held_mode=None)))


def test_an_attachment_holds_in_its_own_mode(there: Rows) -> None:
    volume = there.volume(held_mode="ro", state="in-use")
    refused(there, lambda s: s.add(rows.attachment(there.alice.id, volume.id, "rw", held_mode="ro")))


def test_nobody_attaches_to_a_volume_that_does_not_say_so(there: Rows) -> None:
    volume = there.volume()
    refused(there, lambda s: s.add(rows.attachment(there.alice.id, volume.id)))


def test_many_readers_are_possible_but_each_initiator_once(there: Rows) -> None:
    volume = there.volume(held_mode="ro", state="in-use")
    first = there.attachment(volume, "ro")
    there.attachment(volume, "ro")
    again = rows.attachment(there.alice.id, volume.id, "ro", initiator=first.initiator)
    refused(there, lambda s: s.add(again))


def test_detached_holds_nothing_and_all_else_holds(there: Rows) -> None:
    volume = there.volume(held_mode="rw", state="in-use")
    refused(there, lambda s: s.add(rows.attachment(there.alice.id, volume.id, state="detached")))
    for state in STATES[Attachment]:
        if state != "detached":
            loose = rows.attachment(there.alice.id, volume.id, state=state, held_mode=None)
            refused(there, lambda s, loose=loose: s.add(loose))  # type: ignore[misc]
    there.attachment(volume)
    ended = update(Attachment).where(Attachment.volume_id == volume.id).values(state="detached")
    refused(there, lambda s: s.execute(ended))
    with there.database.write() as session:
        session.execute(ended.values(held_mode=None))
        session.execute(update(Volume).where(Volume.id == volume.id).values(held_mode=None))
    with there.database.read() as session:
        assert session.scalars(select(Attachment.held_mode)).all() == [None]


def test_counters_below_zero_a_number_given_twice_and_an_owner_lost_are_refused(there: Rows) -> None:
    volume = there.volume()
    refused(there, lambda s: s.execute(update(Volume).values(readers=Volume.readers - 1)))
    refused(there, lambda s: s.add(rows.volume(there.alice.id, volume.tid)))
    refused(there, lambda s: s.execute(delete(type(there.alice))))
    refused(there, lambda s: s.add(rows.volume(there.alice.id, 7, pool="nowhere")))


def test_sizes_of_every_volume_fit(there: Rows) -> None:
    identifier = there.volume(size=1 << 50).id
    with there.database.read() as session:
        assert session.get_one(Volume, identifier).size == 1 << 50
