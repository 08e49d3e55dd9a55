"""What becomes of an operation: done, tried again, given up, cancelled, lost, or left when its worker could not say."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError

from app import attachments, operations, snapshots, volumes
from app.auth import Caller
from app.db import Database
from app.models import Attachment, Event, Operation, Snapshot, Volume, WorkerBeat
from app.operations import Cancelled, Lost
from app.schemas import AttachmentCreate, SnapshotCreate, VolumeCreate, VolumeUpdate
from app.states import now
from app.steps.job import Again, Job
from app.worker import ATTEMPTS, Worker, code_of
from iscsi.target import TargetBusy, TargetLimit, TargetRefused, TargetUnavailable
from pools import BackingMissing, PoolError, PoolFull, PoolUnusable
from tests.support import invariants
from tests.support.house import House, open_house
from tests.support.rows import MIB

BODY = AttachmentCreate(instance_id="i", node="n", initiator="iqn.2026-11.org.example:one")


@pytest.fixture
def house(tmp_path: Path, database: Database) -> Iterator[House]:
    """Its worker claims only when told to."""
    with open_house(tmp_path / "home", database, attachments={"direct": True}) as opened:
        yield opened


@pytest.fixture
def alice(house: House) -> Caller:
    return house.caller("alice")


class Faulty:
    """A pool or target whose named method does `fault` first; `fault` raises to make it fail."""

    def __init__(self, inner: Any, method: str, fault: Callable[..., None]) -> None:
        self._inner, self._method, self._fault = inner, method, fault

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._inner, name)
        if name != self._method:
            return real

        def faulty(*arguments: Any, **options: Any) -> Any:
            self._fault(*arguments, **options)
            return real(*arguments, **options)

        return faulty


def failing(times: int, error: Exception) -> Callable[..., None]:
    left = [times]

    def fault(*_: object, **__: object) -> None:
        if left[0]:
            left[0] -= 1
            raise error

    return fault


def break_pool(house: House, method: str, fault: Callable[..., None]) -> None:
    house.outside.pools["default"] = Faulty(house.outside.pools["default"], method, fault)


def break_target(house: House, method: str, fault: Callable[..., None]) -> None:
    house.outside.target = Faulty(house.target, method, fault)


def step(house: House, operation: Operation | None, worker: Worker | None = None) -> Operation:
    """Claim it, whatever its time, and work on it once."""
    assert operation is not None
    worker = worker or house.worker
    with house.database.write() as session:
        session.execute(update(Operation).where(Operation.id == operation.id).values(not_before=now()))
    claimed = operations.claim(house.database, worker.name, operation.lane, 30)
    assert claimed is not None
    assert claimed.id == operation.id
    worker.work(claimed)
    return row(house, operation.id)


def row(house: House, identifier: UUID) -> Operation:
    with house.database.read() as session:
        return session.get_one(Operation, identifier)


def volume_of(house: House, identifier: UUID) -> Volume:
    with house.database.read() as session:
        return session.get_one(Volume, identifier)


def create(house: House, alice: Caller, **body: Any) -> Operation:
    return house.do(volumes.create, house.settings, alice, VolumeCreate(**{"size": 4 * MIB, **body}))


def made(house: House, alice: Caller) -> UUID:
    done = step(house, create(house, alice))
    assert done.state == "succeeded"
    return done.resource_id


def attached(house: House, alice: Caller, volume: UUID) -> UUID:
    asked = house.do(attachments.attach, house.settings, house.keys, alice, volume, BODY)
    assert step(house, asked).state == "succeeded"
    return asked.resource_id


def detach(house: House, alice: Caller, attachment: UUID) -> Operation:
    found = house.do(lambda session: attachments.detach(session, alice, attachment, force=False))
    assert found is not None
    return found


# ---------------------------------------------------------------- done


def test_an_operation_ends_together_with_what_became_of_its_resource(house: House, alice: Caller) -> None:
    done = step(house, create(house, alice))
    assert (done.state, done.progress, done.error_code, done.lease_until) == ("succeeded", 100, None, None)
    assert done.finished_at is not None
    assert volume_of(house, done.resource_id).state == "available"
    assert [item.size for item in house.outside.pools["default"].inventory()] == [4 * MIB]
    with house.database.read() as session:
        told = session.scalars(select(Event).where(Event.resource_id == done.resource_id).order_by(Event.id)).all()
    assert [(event.kind, event.actor) for event in told] == [("volume.create", "alice"), ("volume.created", "alice")]
    invariants.check(house.database, idle=True)


def test_what_was_deleted_already_is_deleted(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    first = house.do(volumes.request_delete, alice, volume, None)
    claimed = operations.claim(house.database, house.worker.name, "data", 30)
    assert claimed is not None
    house.worker.work(claimed)
    with house.database.write() as session:
        again = operations.enqueue(session, "volume.delete", alice, volume, ("volume", volume))
    assert (row(house, first.id).state, step(house, again).state) == ("succeeded", "succeeded")
    assert house.outside.pools["default"].inventory() == []


def test_what_there_is_nothing_left_to_do_for_is_cancelled(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    asked = house.do(attachments.attach, house.settings, house.keys, alice, volume, BODY)
    fence = detach(house, alice, asked.resource_id)
    gone = step(house, asked)
    assert (gone.state, gone.error_code) == ("cancelled", "changed-meanwhile")
    assert step(house, fence).state == "succeeded"
    invariants.check(house.database, idle=True)


# ---------------------------------------------------------------- tried again, given up


def test_a_passing_trouble_is_tried_again(house: House, alice: Caller) -> None:
    break_pool(house, "create", failing(ATTEMPTS - 1, OSError(5, "Input/output error")))
    asked = create(house, alice)
    for attempt in range(1, ATTEMPTS):
        waiting = step(house, asked)
        assert (waiting.state, waiting.attempt) == ("queued", attempt)
        assert waiting.message == "trying again: Input/output error"
    assert step(house, asked).state == "succeeded"
    invariants.check(house.database, idle=True)


def test_a_trouble_that_does_not_pass_ends_in_an_error_that_says_why(house: House, alice: Caller) -> None:
    break_pool(house, "create", failing(99, OSError(5, "Input/output error")))
    asked = create(house, alice)
    states = [step(house, asked).state for _ in range(ATTEMPTS)]
    assert states == ["queued"] * (ATTEMPTS - 1) + ["failed"]
    ended, volume = row(house, asked.id), volume_of(house, asked.resource_id)
    assert (ended.error_code, ended.error_detail) == ("io-error", "Input/output error")
    assert (volume.state, volume.error) == ("error", "[Errno 5] Input/output error")
    invariants.check(house.database, idle=True)


def test_what_cannot_get_better_is_not_tried_again(house: House, alice: Caller) -> None:
    break_pool(house, "create", failing(99, PoolFull("default")))
    ended = step(house, create(house, alice))
    assert (ended.state, ended.error_code, ended.attempt) == ("failed", "pool-full", 1)
    assert operations.problem_of(ended).status == 409


def test_waiting_is_no_failed_try(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    attached(house, alice, volume)
    break_target(house, "grow", failing(ATTEMPTS * 2, TargetUnavailable("tgtd does not answer")))
    asked = house.do(volumes.update_record, house.settings, alice, volume, VolumeUpdate(size=8 * MIB), None)
    for _ in range(ATTEMPTS * 2):
        waiting = step(house, asked)
        assert (waiting.state, waiting.attempt) == ("queued", 0)
    assert step(house, asked).state == "succeeded"
    assert volume_of(house, volume).size == 8 * MIB
    invariants.check(house.database, idle=True)


@pytest.mark.parametrize(
    "error",
    [TargetRefused("delete account", 22, "no"), TargetUnavailable("away"), OSError(5, "EIO"), KeyError("a bug")],
)
def test_a_fence_is_never_given_up(house: House, alice: Caller, error: Exception) -> None:
    volume = made(house, alice)
    attachment = attached(house, alice, volume)
    break_target(house, "drain", failing(ATTEMPTS + 2, error))
    fence = detach(house, alice, attachment)
    for _ in range(ATTEMPTS + 2):
        assert step(house, fence).state == "queued"
        assert volume_of(house, volume).held_mode == "rw"  # and nobody else gets it meanwhile
    assert step(house, fence).state == "succeeded"
    assert volume_of(house, volume).state == "available"
    assert house.target.inventory() == []
    invariants.check(house.database, idle=True)


def test_what_a_failed_attach_made_is_taken_down(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    break_target(house, "ensure_export", failing(99, TargetLimit("threads", 5, 0)))
    asked = house.do(attachments.attach, house.settings, house.keys, alice, volume, BODY)
    assert (step(house, asked).state, row(house, asked.id).error_code) == ("failed", "target-limit")
    with house.database.read() as session:
        attachment = session.get_one(Attachment, asked.resource_id)
    assert attachment.state == "detaching"
    assert attachment.error is not None
    assert "threads" in attachment.error
    (fence,) = house.open_operations()
    assert step(house, fence).state == "succeeded"
    assert volume_of(house, volume).state == "available"
    invariants.check(house.database, idle=True)


def test_a_grow_that_the_pool_refuses_leaves_the_volume_as_it_was(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    break_pool(house, "resize", failing(99, PoolFull("default")))
    asked = house.do(volumes.update_record, house.settings, alice, volume, VolumeUpdate(size=8 * MIB), None)
    assert step(house, asked).state == "failed"
    found = volume_of(house, volume)
    assert (found.state, found.size, found.new_size) == ("available", 4 * MIB, None)
    invariants.check(house.database, idle=True)


def test_a_grow_waits_for_writes_in_flight(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    attached(house, alice, volume)
    break_target(house, "grow", failing(1, TargetBusy(volume, [])))
    asked = house.do(volumes.update_record, house.settings, alice, volume, VolumeUpdate(size=8 * MIB), None)
    assert step(house, asked).state == "queued"
    assert step(house, asked).state == "succeeded"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PoolFull("p"), "pool-full"),
        (PoolUnusable("p", "why"), "pool-unusable"),
        (PoolError("p", "why"), "pool-failed"),
        (TargetUnavailable("x"), "target-unavailable"),
        (TargetLimit("threads", 5, 0), "target-limit"),
        (TargetRefused("op", 22, "no"), "target-failed"),
        (Cancelled(), "cancelled"),
        (KeyError("a bug"), "internal-error"),
    ],
)
def test_every_failure_has_a_code(error: Exception, code: str) -> None:
    assert code_of(error) == code


# ---------------------------------------------------------------- copies that fail


def test_a_failed_copy_gives_its_source_free_and_says_why(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    break_pool(house, "clone_volume", failing(99, PoolFull("default")))
    asked = create(house, alice, size=None, volume=volume)
    assert volume_of(house, volume).readers == 1
    assert step(house, asked).error_code == "pool-full"
    assert (volume_of(house, volume).readers, volume_of(house, asked.resource_id).state) == (0, "error")
    assert step(house, house.do(volumes.request_delete, alice, asked.resource_id, None)).state == "succeeded"
    invariants.check(house.database, idle=True)


def test_a_failed_snapshot_gives_its_volume_free_and_can_be_deleted(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    break_pool(house, "snapshot", failing(99, PoolFull("default")))
    asked = house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate())
    assert step(house, asked).error_code == "pool-full"
    with house.database.read() as session:
        assert session.get_one(Snapshot, asked.resource_id).state == "error"
    assert step(house, house.do(snapshots.request_delete, alice, asked.resource_id, None)).state == "succeeded"
    invariants.check(house.database, idle=True)


def test_a_failed_revert_leaves_an_error_that_an_admin_can_reset(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    snapshot = step(house, house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate())).resource_id
    break_pool(house, "revert", failing(1, PoolError("default", "away")))
    assert step(house, house.do(volumes.revert, alice, volume, snapshot)).error_code == "pool-failed"
    assert volume_of(house, volume).state == "error"
    root = house.caller("root", "admin")
    assert step(house, house.do(volumes.reset_state, root, volume)).state == "succeeded"
    assert (volume_of(house, volume).state, volume_of(house, volume).error) == ("available", None)
    assert step(house, house.do(volumes.revert, alice, volume, snapshot)).state == "succeeded"
    invariants.check(house.database, idle=True)


def test_a_revert_that_finds_no_room_leaves_the_volume_as_it_was(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    snapshot = step(house, house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate())).resource_id
    break_pool(house, "revert", failing(1, PoolFull("default")))
    assert step(house, house.do(volumes.revert, alice, volume, snapshot)).error_code == "pool-full"
    assert volume_of(house, volume).state == "available"
    invariants.check(house.database, idle=True)


def test_a_delete_that_fails_can_be_asked_for_again(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    snapshot = step(house, house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate())).resource_id
    break_pool(house, "delete_volume", failing(1, PoolError("default", "away")))
    break_pool(house, "delete_snapshot", failing(1, PoolError("default", "away")))
    for request, identifier in ((volumes.request_delete, volume), (snapshots.request_delete, snapshot)):
        asked = house.do(request, alice, identifier, None)
        assert step(house, asked).error_code == "pool-failed"
        assert step(house, house.do(request, alice, identifier, None)).state == "succeeded"
    invariants.check(house.database, idle=True)


def test_reset_finds_out_what_is_there(house: House, alice: Caller) -> None:
    root = house.caller("root", "admin")
    volume = made(house, alice)
    backing = house.outside.pools["default"].backing(volume).path
    aside = backing.with_name("aside")
    backing.rename(aside)
    step(house, house.do(volumes.reset_state, root, volume))
    assert volume_of(house, volume).state == "error"
    with backing.open("wb") as file:
        file.truncate(MIB)
    step(house, house.do(volumes.reset_state, root, volume))
    assert volume_of(house, volume).error == f"the backing has {MIB} of {4 * MIB} bytes"
    aside.rename(backing)
    step(house, house.do(volumes.reset_state, root, volume))
    assert volume_of(house, volume).state == "available"
    attached(house, alice, volume)
    step(house, house.do(volumes.reset_state, root, volume))
    assert volume_of(house, volume).state == "in-use"
    house.outside.pools.clear()
    asked = house.do(volumes.reset_state, root, volume)
    failed = [step(house, asked) for _ in range(ATTEMPTS)][-1]
    assert (failed.error_code, volume_of(house, volume).state) == ("pool-unusable", "in-use")
    invariants.check(house.database, idle=True)


# ---------------------------------------------------------------- cancelled


def _copies(house: House, alice: Caller) -> dict[str, Callable[[], Operation]]:
    volume = made(house, alice)
    snapshot = step(house, house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate())).resource_id
    return {
        "clone_volume": lambda: create(house, alice, size=None, volume=volume),
        "clone_snapshot": lambda: create(house, alice, size=None, snapshot=snapshot),
        "snapshot": lambda: house.do(snapshots.create, house.settings, alice, volume, SnapshotCreate()),
        "revert": lambda: house.do(volumes.revert, alice, volume, snapshot),
    }


@pytest.mark.parametrize("method", ["clone_volume", "clone_snapshot", "snapshot", "revert"])
def test_a_copy_that_is_cancelled_while_queued_leaves_nothing(house: House, alice: Caller, method: str) -> None:
    asked = _copies(house, alice)[method]()
    before = len(house.outside.pools["default"].inventory())
    house.do(operations.cancel, alice, asked.id)
    ended = step(house, asked)
    assert (ended.state, ended.error_code) == ("cancelled", "cancelled")
    assert len(house.outside.pools["default"].inventory()) == before
    _assert_no_trace(house, asked)


@pytest.mark.parametrize("method", ["clone_volume", "clone_snapshot", "snapshot", "revert"])
def test_a_copy_that_is_cancelled_in_the_middle_leaves_nothing(house: House, alice: Caller, method: str) -> None:
    asked = _copies(house, alice)[method]()
    before = len(house.outside.pools["default"].inventory())

    def cancel_then_copy(*arguments: Any) -> None:
        house.do(operations.cancel, alice, asked.id)
        progress = arguments[-1]
        progress.__self__._reported -= Job.REPORT  # as if half a second had gone by
        progress(1, 4)

    break_pool(house, method, cancel_then_copy)
    assert step(house, asked).state == "cancelled"
    assert len(house.outside.pools["default"].inventory()) == before
    _assert_no_trace(house, asked)


def _assert_no_trace(house: House, asked: Operation) -> None:
    with house.database.read() as session:
        if asked.kind == "volume.revert":
            assert session.get_one(Volume, asked.resource_id).state == "available"
        else:
            assert session.get(Volume, asked.resource_id) is None
            assert session.get(Snapshot, asked.resource_id) is None
    invariants.check(house.database, idle=True)


def test_progress_is_told_now_and_then(house: House, alice: Caller) -> None:
    told: list[int] = []
    asked = _copies(house, alice)["clone_volume"]()

    def copy(*arguments: Any) -> None:
        progress = arguments[-1]
        for done in (1, 2, 3):
            progress(done, 4)  # too soon after the last
            progress.__self__._reported -= Job.REPORT
            progress(done, 4)
            told.append(row(house, asked.id).progress)

    break_pool(house, "clone_volume", copy)
    assert step(house, asked).state == "succeeded"
    assert told == [25, 50, 75]


def test_a_copy_gives_way_when_the_service_stops(house: House, alice: Caller) -> None:
    asked = _copies(house, alice)["clone_volume"]()
    break_pool(house, "clone_volume", lambda *arguments: _stop_then_copy(house, arguments[-1]))
    waiting = step(house, asked)
    assert (waiting.state, waiting.message, waiting.attempt) == ("queued", "the service is restarting", 0)


def _stop_then_copy(house: House, progress: Callable[[int, int], None]) -> None:
    house.worker.stopping.set()
    with pytest.raises(Again):
        progress(1, 4)
    progress(1, 4)


# ---------------------------------------------------------------- lost, and left


def test_a_worker_that_comes_back_late_changes_nothing(house: House, alice: Caller) -> None:
    asked = create(house, alice)
    late = operations.claim(house.database, "elsewhere:1:x", "data", 30)
    assert late is not None
    _expire(house, asked)
    assert step(house, asked).state == "succeeded"
    ended = row(house, asked.id)
    with pytest.raises(Lost):
        house.worker.work(late)
    assert row(house, asked.id).finished_at == ended.finished_at
    assert volume_of(house, asked.resource_id).version == 2


def test_who_waits_for_the_volumes_lock_looks_again_before_acting(house: House, alice: Caller) -> None:
    asked = create(house, alice)
    late = operations.claim(house.database, "elsewhere:1:x", "data", 30)
    assert late is not None
    _expire(house, asked)
    assert operations.claim(house.database, house.worker.name, "data", 30) is not None
    with pytest.raises(Lost):
        house.worker.work(late)
    assert house.outside.pools["default"].inventory() == []


def _expire(house: House, operation: Operation) -> None:
    with house.database.write() as session:
        over = now() - dt.timedelta(seconds=1)
        session.execute(update(Operation).where(Operation.id == operation.id).values(lease_until=over))


def test_what_a_thread_could_not_end_is_not_renewed_and_tried_again(house: House, alice: Caller) -> None:
    """Undoing failed, so nothing could be written; a worker that lives must not keep it for ever."""
    asked = _copies(house, alice)["clone_volume"]()
    house.do(operations.cancel, alice, asked.id)
    break_pool(house, "delete_volume", failing(1, PoolError("default", "away")))
    claimed = operations.claim(house.database, house.worker.name, "data", 30)
    assert claimed is not None
    house.worker._run(claimed)
    before = row(house, asked.id)
    assert before.state == "running"
    house.worker.beat()
    assert row(house, asked.id).lease_until == before.lease_until
    _expire(house, asked)
    assert step(house, asked).state == "cancelled"
    invariants.check(house.database, idle=True)


def test_what_this_version_does_not_know_ends_as_failed(house: House, alice: Caller) -> None:
    """Of a newer one that was here before: it must not come back for ever."""
    asked = create(house, alice)
    with house.database.write() as session:
        session.execute(update(Operation).where(Operation.id == asked.id).values(kind="volume.transmute"))
    ended = step(house, asked)
    assert (ended.state, ended.error_code) == ("failed", "unknown-kind")


def test_a_beat_keeps_what_is_in_hand_and_says_that_the_worker_lives(house: House, alice: Caller) -> None:
    asked = create(house, alice)
    seen: list[dt.datetime | None] = []

    def beat_meanwhile(*_: object) -> None:
        _expire(house, asked)
        house.worker.beat()
        seen.append(row(house, asked.id).lease_until)

    break_pool(house, "create", beat_meanwhile)
    claimed = operations.claim(house.database, house.worker.name, "data", 30)
    assert claimed is not None
    house.worker._run(claimed)
    assert seen[0] is not None
    assert seen[0] > now()
    with house.database.read() as session:
        beat = session.scalars(select(WorkerBeat)).one()
    assert not beat.ready
    assert now() - beat.beat_at < dt.timedelta(seconds=30)


def test_a_running_worker_takes_over_what_a_dead_one_left(house: House, alice: Caller) -> None:
    asked = create(house, alice)
    earlier = Worker(house.outside, house.bus)
    assert operations.claim(house.database, earlier.name, "data", 3600) is not None
    house.start()
    assert house.ended(asked).state == "succeeded"
    assert row(house, asked.id).fence == 2


def test_without_its_target_volumes_are_made_and_copied_but_not_attached(house: House, alice: Caller) -> None:
    house.worker.ready.clear()
    volume = made(house, alice)
    asked = house.do(attachments.attach, house.settings, house.keys, alice, volume, BODY)
    threads = house.worker.start()
    assert house.ended(create(house, alice)).state == "succeeded"
    assert row(house, asked.id).state == "queued"
    house.worker.ready.set()
    assert house.ended(asked).state == "succeeded"
    house.worker.stopping.set()
    for thread in threads:
        thread.join(30)


def test_a_worker_outlives_a_database_that_is_away(house: House, alice: Caller) -> None:
    with house.database.write() as session:
        session.execute(text("ALTER TABLE operations RENAME TO away"))
    assert house.worker._claim("data") is None
    with pytest.raises(DBAPIError):
        house.worker.beat()
    with house.database.write() as session:
        session.execute(text("ALTER TABLE away RENAME TO operations"))
    house.start()
    assert house.ended(create(house, alice)).state == "succeeded"


def test_a_backing_that_is_gone_is_said_so(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    house.outside.pools["default"].backing(volume).path.unlink()
    asked = house.do(attachments.attach, house.settings, house.keys, alice, volume, BODY)
    assert step(house, asked).error_code == code_of(BackingMissing("default", "volume", volume)) == "backing-missing"
