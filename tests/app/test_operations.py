"""The queue: what is claimed, by whom, in which order, and what a worker that lost its lease can still do."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import operations
from app.auth import Caller
from app.db import Database
from app.errors import Problem
from app.ids import new_id
from app.models import Event, Operation, User
from app.operations import Lost, claim, enqueue, finish, put_back, renew, take_over
from app.states import now
from tests.support import rows

LEASE = 30.0


def queue(database: Database, subject: UUID | None = None, kind: str = "volume.create", **parameters: int) -> UUID:
    subject = subject or new_id()
    with database.write() as session:
        return enqueue(session, kind, None, subject, ("volume", subject), **parameters).id


def take(database: Database, worker: str = "host:1:a", lane: str = "data", lease: float = LEASE) -> Operation:
    taken = claim(database, worker, lane, lease)
    assert taken is not None
    return taken


def row(database: Database, identifier: UUID) -> Operation:
    with database.read() as session:
        return session.get_one(Operation, identifier)


def end(database: Database, operation: Operation, state: str = "succeeded") -> None:
    with database.write() as session:
        finish(session, operation, state)


def expire(database: Database, identifier: UUID) -> None:
    """The lease is over (the clock is not ours to move)."""
    with database.write() as session:
        over = now() - dt.timedelta(seconds=1)
        session.execute(update(Operation).where(Operation.id == identifier).values(lease_until=over))


# ---------------------------------------------------------------- claims


def test_an_operation_is_claimed_once_with_a_lease_and_a_fence(database: Database) -> None:
    identifier = queue(database, size=7)
    taken = take(database)
    assert (taken.id, taken.state, taken.fence, taken.attempt, taken.worker) == (
        identifier,
        "running",
        1,
        1,
        "host:1:a",
    )
    assert taken.parameters == {"size": 7}
    assert taken.lease_until is not None
    assert taken.lease_until > now() + dt.timedelta(seconds=LEASE - 5)
    assert claim(database, "host:2:b", "data", LEASE) is None


def test_lanes_do_not_wait_for_one_another(database: Database) -> None:
    subject = new_id()
    data, fence = queue(database, subject), queue(database, subject, "attachment.detach")
    assert take(database, lane="data").id == data
    assert take(database, lane="export").id == fence


@pytest.mark.parametrize("lane", ["data", "export"])
def test_one_runs_for_a_subject_and_the_others_follow_in_order(database: Database, lane: str) -> None:
    kind, subject = {"data": "volume.create", "export": "attachment.attach"}[lane], new_id()
    first, second, third = (queue(database, subject, kind) for _ in range(3))
    other = queue(database, kind=kind)
    order = [take(database, lane=lane), take(database, lane=lane)]
    assert [operation.id for operation in order] == [first, other]
    assert claim(database, "host:1:a", lane, LEASE) is None
    for expected in (second, third):
        end(database, order[0])
        order = [take(database, lane=lane)]
        assert order[0].id == expected


def test_two_running_operations_of_a_subject_cannot_be_written(database: Database) -> None:
    subject = new_id()
    queue(database, subject)
    second = queue(database, subject)
    take(database)
    forced = update(Operation).where(Operation.id == second).values(state="running")
    with pytest.raises(IntegrityError), database.write() as session:
        session.execute(forced)


def test_twenty_workers_at_once_share_the_work_without_overlap(database: Database) -> None:
    wanted = {queue(database) for _ in range(30)}

    def worker(number: int) -> list[UUID]:
        mine = []
        for _ in range(200):
            taken = claim(database, f"host:{number}:x", "data", LEASE)
            if taken is not None:
                mine.append(taken.id)
            elif all(row(database, identifier).state == "running" for identifier in wanted):
                break
        return mine

    with ThreadPoolExecutor(20) as pool:
        shares = list(pool.map(worker, range(20)))
    taken = [identifier for share in shares for identifier in share]
    assert len(taken) == len(set(taken))
    assert set(taken) == wanted


# ---------------------------------------------------------------- put back, retried


def test_what_was_put_back_waits_for_its_time_and_keeps_its_turn_in_the_data_lane(database: Database) -> None:
    subject = new_id()
    first, second = queue(database, subject), queue(database, subject)
    taken = take(database)
    with database.write() as session:
        put_back(session, taken, 3600, "later", failed=False)
    assert claim(database, "host:1:a", "data", LEASE) is None  # the second must not overtake: it may build on the first
    waiting = row(database, first)
    assert (waiting.state, waiting.message, waiting.lease_until) == ("queued", "later", None)
    with database.write() as session:
        session.execute(update(Operation).where(Operation.id == first).values(not_before=now()))
    again = take(database)
    assert (again.id, again.fence) == (first, 2)
    end(database, again)
    assert take(database).id == second


def test_a_fence_that_waits_holds_up_no_other(database: Database) -> None:
    subject = new_id()
    queue(database, subject, "attachment.detach")
    other = queue(database, subject, "attachment.detach")
    first = take(database, lane="export")
    with database.write() as session:
        put_back(session, first, 3600, "a write is in flight", failed=False)
    assert take(database, lane="export").id == other


def test_only_a_failed_try_counts(database: Database) -> None:
    queue(database)
    for failed, expected in ((False, 1), (False, 1), (True, 1), (True, 2), (False, 3), (True, 3), (False, 4)):
        taken = take(database)
        assert taken.attempt == expected
        with database.write() as session:
            put_back(session, taken, 0, "again", failed=failed)


# ---------------------------------------------------------------- leases


def test_an_operation_whose_lease_is_over_is_taken_over(database: Database) -> None:
    identifier = queue(database)
    lost = take(database)
    assert claim(database, "other:1:b", "data", LEASE) is None
    expire(database, identifier)
    found = take(database, "other:1:b")
    assert (found.id, found.fence, found.attempt, found.worker) == (identifier, lost.fence + 1, 2, "other:1:b")


def test_who_lost_the_lease_writes_nothing(database: Database) -> None:
    identifier = queue(database)
    lost = take(database)
    expire(database, identifier)
    found = take(database, "other:1:b")

    def write(change: Callable[[Session], None]) -> None:
        with database.write() as session:
            session.add(rows.user("written-by-the-loser"))
            change(session)

    for change in (
        lambda session: finish(session, lost, "succeeded"),
        lambda session: put_back(session, lost, 0, "again", failed=True),
        lambda session: operations.guarded(session, lost, progress=50),
    ):
        with pytest.raises(Lost):
            write(change)
    with database.read() as session:
        assert session.scalars(select(User)).all() == []
    end(database, found)
    assert row(database, identifier).state == "succeeded"
    with pytest.raises(Lost):
        end(database, found)  # once


def test_only_what_is_in_hand_is_renewed(database: Database) -> None:
    kept, dropped, foreign = (queue(database) for _ in range(3))
    for name in ("host:1:a", "host:1:a", "other:1:b"):
        take(database, name, lease=5)
    with database.write() as session:
        renew(session, "host:1:a", {kept, foreign}, 1000)
    soon = now() + dt.timedelta(seconds=500)
    renewed = [identifier for identifier in (kept, dropped, foreign) if _lease(database, identifier) > soon]
    assert renewed == [kept]


def _lease(database: Database, identifier: UUID) -> dt.datetime:
    until = row(database, identifier).lease_until
    assert until is not None
    return until


def test_a_new_worker_of_a_host_takes_over_what_the_dead_one_had(database: Database) -> None:
    mine, foreign = queue(database), queue(database)
    take(database, "host_1:1:a")
    take(database, "hostx1:1:b")  # "_" is a wildcard of LIKE
    assert take_over(database, "host_1") == 1
    assert take(database, "host_1:2:c").id == mine
    assert claim(database, "host_1:2:c", "data", LEASE) is None
    assert row(database, foreign).fence == 1


# ---------------------------------------------------------------- cancel


def _caller(database: Database, name: str, role: str = "user") -> Caller:
    with database.write() as session:
        someone = rows.user(name, role)
        session.add(someone)
    return Caller(someone.id, name, role)


def test_cancelling_asks_and_is_recorded(database: Database) -> None:
    alice = _caller(database, "alice")
    subject = new_id()
    with database.write() as session:
        identifier = enqueue(session, "volume.clone", alice, subject, ("volume", subject)).id
    with database.write() as session:
        assert operations.cancel(session, alice, identifier).cancel_requested
    assert row(database, identifier).state == "queued"  # the worker undoes what there is to undo
    with database.read() as session:
        told = session.scalars(select(Event).where(Event.kind == "operation.cancel")).one()
    assert (told.actor, told.detail) == ("alice", {"operation": str(identifier)})


def test_what_cannot_be_cancelled_says_so_and_what_has_ended_stays(database: Database) -> None:
    alice = _caller(database, "alice")
    subject = new_id()
    with database.write() as session:
        fence = enqueue(session, "attachment.detach", alice, subject, ("attachment", subject)).id
        done = enqueue(session, "volume.clone", alice, subject, ("volume", subject)).id
    end(database, take(database))
    with pytest.raises(Problem) as refused, database.write() as session:
        operations.cancel(session, alice, fence)
    assert (refused.value.status, refused.value.code) == (409, "not-cancellable")
    with database.write() as session:
        assert operations.cancel(session, alice, done).state == "succeeded"
    assert not row(database, done).cancel_requested


def test_only_who_asked_for_it_and_admins_see_an_operation(database: Database) -> None:
    alice, bob, root = _caller(database, "alice"), _caller(database, "bob"), _caller(database, "root", "admin")
    subject = new_id()
    with database.write() as session:
        identifier = enqueue(session, "volume.clone", alice, subject, ("volume", subject)).id
    with database.read() as session:
        assert operations.find(session, alice, identifier).id == identifier
        assert operations.find(session, root, identifier).id == identifier
        with pytest.raises(Problem) as refused:
            operations.find(session, bob, identifier)
    assert (refused.value.status, refused.value.code) == (404, "operation-not-found")


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("failed", "pool-full", 409),
        ("failed", "backing-missing", 409),
        ("failed", "target-unavailable", 503),
        ("failed", "pool-unusable", 503),
        ("failed", "internal-error", 500),
        ("cancelled", "cancelled", 409),
    ],
)
def test_what_a_client_is_told_of_an_operation_that_did_not_succeed(state: str, code: str, status: int) -> None:
    ended = rows.operation(new_id(), state=state, error_code=code, error_detail="why")
    problem = operations.problem_of(ended)
    assert (problem.status, problem.code, problem.detail) == (status, code, "why")


# ---------------------------------------------------------------- workers that die


def test_two_hundred_operations_survive_six_workers_that_are_killed_again_and_again(
    database: Database, database_url: str
) -> None:
    subjects = [new_id() for _ in range(40)]
    kinds = ("volume.create", "attachment.attach")
    made = [queue(database, subjects[n % 40], kinds[n // 40 % 2]) for n in range(200)]
    argv = [sys.executable, "-m", "tests.support.crashing_workers", database_url, "6", "30", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with database.read() as session:
        found = {operation.id: operation for operation in session.scalars(select(Operation))}
        events = list(session.scalars(select(Event).order_by(Event.id)))
    assert {operation.state for operation in found.values()} == {"succeeded"}
    ended = [event for event in events if event.kind == "ended"]
    assert sorted(str(event.resource_id) for event in ended) == sorted(map(str, made))  # each exactly once
    assert all(found[event.resource_id].fence == event.detail["fence"] for event in ended if event.resource_id)
    assert any(operation.fence > 1 for operation in found.values())  # some were taken over indeed
    _assert_one_at_a_time(events, found)


def _assert_one_at_a_time(events: list[Event], found: dict[UUID, Operation]) -> None:
    """Of each subject and lane, operations began and ended one after the other, in the order they were asked for."""
    histories: dict[tuple[UUID, str], list[UUID]] = defaultdict(list)
    for event in events:
        assert event.resource_id is not None
        operation = found[event.resource_id]
        history = histories[operation.subject_id, operation.lane]
        if event.kind == "began" and (not history or history[-1] != operation.id):
            history.append(operation.id)
        elif event.kind == "ended":
            assert history[-1] == operation.id
    assert len(histories) == 80
    for history in histories.values():
        assert history == sorted(set(history))
