"""Between operations: pools that fill up or go away, drift, sessions that should not be, answers forgotten."""

from __future__ import annotations

import datetime as dt
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select, update

from app import attachments, events, volumes
from app.auth import Caller
from app.db import Database
from app.errors import Problem
from app.housekeeping import _alarm
from app.ids import new_id
from app.keeper import Keeper
from app.models import Attachment, Event, IdempotencyKey, Operation, Pool, Volume
from app.operations import enqueue
from app.reconcile import converge, converge_export, look, rebuild
from app.schemas import AttachmentCreate, VolumeCreate
from app.states import now
from app.steps.site import SITE
from app.watch import SessionWatch
from iscsi.target import TargetUnavailable
from tests.support import invariants, rows
from tests.support.filesystems import mounted
from tests.support.house import House, open_house
from tests.support.initiator import Initiator
from tests.support.rows import MIB
from tests.support.service import free_port, wait_until

IQN = "iqn.2026-11.org.example:one"


@pytest.fixture
def portal() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def house(tmp_path: Path, database: Database, portal: str) -> Iterator[House]:
    with open_house(tmp_path / "home", database, attachments={"direct": True}, iscsi={"portal": portal}) as opened:
        opened.start()
        yield opened


@pytest.fixture
def alice(house: House) -> Caller:
    return house.caller("alice")


def made(house: House, alice: Caller, size: int = MIB) -> UUID:
    return house.ended(house.do(volumes.create, house.settings, alice, VolumeCreate(size=size))).resource_id


def attached(house: House, alice: Caller, volume: UUID, initiator: str = IQN, mode: Any = "rw") -> UUID:
    body = AttachmentCreate(instance_id="i", node="n", initiator=initiator, mode=mode)
    done = house.ended(house.do(attachments.attach, house.settings, house.keys, alice, volume, body))
    assert done.state == "succeeded", done.error_detail
    return done.resource_id


def told(house: House, kind: str) -> list[Event]:
    with house.database.read() as session:
        return list(session.scalars(select(Event).where(Event.kind == kind).order_by(Event.id)))


def pool_row(house: House, name: str = "default") -> Pool:
    with house.database.read() as session:
        return session.get_one(Pool, name)


# ---------------------------------------------------------------- pools


@pytest.mark.parametrize(
    ("free", "promised", "allocated", "alarm"),
    [
        (100, 100, 0, None),
        (100, 101, 0, "guests may still write 101B .*100B are free: they may meet a full pool"),
        (100, 300, 200, None),
        (100, 300, 199, "101B"),
        (100, 0, 500, None),
        (9, 0, 0, "only 9B free: no new work is taken until there are 10B"),
        (9, 500, 0, "only 9B free"),
    ],
)
def test_the_alarm_says_what_guests_may_meet(free: int, promised: int, allocated: int, alarm: str | None) -> None:
    found = _alarm(rows.pool(free=free, promised=promised, allocated=allocated, low_space=10), 0)
    if alarm is None:
        assert found is None
    else:
        assert found is not None
        with pytest.raises(AssertionError, match=alarm):
            raise AssertionError(found)


def test_the_alarm_says_that_metadata_runs_out() -> None:
    found = _alarm(rows.pool(free=1000, promised=0, allocated=0, low_space=10), 71.5)
    assert found is not None
    assert "metadata is 72 % full" in found


def test_a_pool_that_fills_up_refuses_new_work_alarms_once_and_recovers(tmp_path: Path, database: Database) -> None:
    with mounted("tmpfs", 32 * MIB, tmp_path) as point:
        pools = {"default": {"path": str(point), "overcommit_ratio": 2, "low_space_percent": 50}}
        with open_house(tmp_path / "home", database, pools=pools) as house:
            house.start()
            alice = house.caller("alice")
            assert pool_row(house).low_space == 16 * MIB
            made(house, alice, 30 * MIB)
            made(house, alice, 20 * MIB)
            house.chores.watch_pools()
            house.chores.watch_pools()
            (alarm,) = told(house, "pool.alarm")
            assert "guests may still write 50MiB" in alarm.detail["alarm"]
            _refused(house, alice, 20 * MIB, "pool-overcommitted")
            (point / "ballast").write_bytes(bytes(20 * MIB))
            house.chores.watch_pools()
            assert "only 11.99MiB free" in str(pool_row(house).alarm)
            _refused(house, alice, MIB, "pool-low-space")
            (point / "ballast").unlink()
            for volume in _all_volumes(house)[:1]:
                house.ended(house.do(volumes.request_delete, alice, volume, None))
            house.chores.watch_pools()
            assert pool_row(house).alarm is None
            assert len(told(house, "pool.alarm-over")) == 1
            made(house, alice)
            invariants.check(database, idle=True)


def _refused(house: House, alice: Caller, size: int, code: str) -> None:
    with pytest.raises(Problem) as refused:
        house.do(volumes.create, house.settings, alice, VolumeCreate(size=size))
    assert (refused.value.status, refused.value.code) == (409, code)
    invariants.check(house.database)


def _all_volumes(house: House) -> list[UUID]:
    with house.database.read() as session:
        return list(session.scalars(select(Volume.id).order_by(Volume.id)))


def test_a_pool_that_goes_away_is_unusable_until_it_is_back(house: House, alice: Caller, tmp_path: Path) -> None:
    path = house.settings.pools["default"].path
    path.rename(tmp_path / "away")
    for _ in range(4):
        house.chores.watch_pools()
    assert pool_row(house).state == "unusable"
    assert "default" not in house.outside.pools
    reasons = [event.detail["reason"] for event in told(house, "pool.unusable")]
    assert reasons
    assert len(reasons) == len(set(reasons))  # each told once, however often it is looked at
    assert not path.exists()  # a known pool is never made anew in the place of one that is not mounted
    _refused(house, alice, MIB, "pool-unusable")
    (tmp_path / "away").rename(path)
    house.chores.watch_pools()
    assert (pool_row(house).state, pool_row(house).reason) == ("active", None)
    made(house, alice)


def test_another_pool_in_its_place_is_not_taken_for_it(house: House, tmp_path: Path) -> None:
    path = house.settings.pools["default"].path
    path.rename(tmp_path / "away")
    path.mkdir(mode=0o700)
    house.outside.pools.clear()
    house.chores.watch_pools()
    assert pool_row(house).state == "unusable"


def test_a_pool_that_left_the_configuration_takes_no_new_work(house: House) -> None:
    with house.database.write() as session:
        session.add(rows.pool("old"))
    house.chores.watch_pools()
    assert (pool_row(house, "old").state, pool_row(house, "old").reason) == (
        "unusable",
        "it is no longer in the configuration",
    )
    assert pool_row(house).state == "active"


# ---------------------------------------------------------------- events and answers


def test_chores_run_each_at_its_time_and_one_that_fails_stops_no_other(house: House, tmp_path: Path) -> None:
    heads = house.settings.log_dir / "event-heads.jsonl"
    heads.mkdir()  # signing fails
    thread = threading.Thread(target=house.chores.run)
    with house.database.write() as session:
        events.record(session, events.SYSTEM, "test")
    thread.start()
    wait_until(lambda: told(house, "test")[0].sequence is not None)
    house.worker.stopping.set()
    thread.join(30)
    heads.rmdir()
    house.chores.close()
    verdict = events.verify(house.database, heads)
    assert (verdict.unsealed, verdict.heads, verdict.broken) == (0, 1, None)


def test_answers_are_forgotten_after_a_day(house: House, alice: Caller) -> None:
    with house.database.write() as session:
        for key, age in (("old-key-1", 25), ("new-key-1", 23)):
            session.add(IdempotencyKey(principal_id=alice.id, key=key, fingerprint="0" * 64,
                                       created_at=now() - dt.timedelta(hours=age)))  # fmt: skip
    house.chores.forget_answers()
    with house.database.read() as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["new-key-1"]


# ---------------------------------------------------------------- drift


def found(house: House) -> list[tuple[str, str]]:
    return [(drift.layer, drift.found) for drift in look(house.outside)]


def test_what_is_as_it_should_be_is_no_drift(house: House, alice: Caller) -> None:
    attached(house, alice, made(house, alice))
    made(house, alice)
    assert found(house) == []
    assert converge(house.outside) == []


def test_a_target_that_is_gone_is_made_again(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    attached(house, alice, volume)
    house.target.drain(volume)
    house.target.remove(volume)
    assert found(house) == [("export", "attached, but there is no target")]
    assert house.target.inventory() == []  # looking changes nothing
    house.chores.reconcile()
    assert found(house) == []
    (export,) = house.target.inventory()
    assert (export.volume_id, export.complete) == (volume, True)


def test_a_target_that_nobody_should_have_is_fenced(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    attachment = attached(house, alice, volume)
    _forget_attachment(house, volume, attachment)
    assert found(house) == [("export", "a target, but nobody is attached")]
    converge(house.outside)
    assert house.target.inventory() == []
    assert found(house) == []


def _forget_attachment(house: House, volume: UUID, attachment: UUID) -> None:
    """As if the database had been restored from before."""
    with house.database.write() as session:
        session.delete(session.get_one(Attachment, attachment))
        session.flush()
        session.execute(update(Volume).where(Volume.id == volume).values(held_mode=None, state="available"))


def test_an_export_that_lost_its_acl_is_completed(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    attached(house, alice, volume)
    house.target.drain(volume)
    assert found(house) == [("export", "differs from the database in: initiators, CHAP names")]
    converge(house.outside)
    assert found(house) == []


def test_a_volume_without_bytes_is_in_error_and_said_so_once(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    house.outside.pools["default"].backing(volume).path.unlink()
    assert found(house) == [("backing", f"volume {volume} has no backing")]
    converge(house.outside)
    converge(house.outside)
    with house.database.read() as session:
        assert session.get_one(Volume, volume).state == "error"
    assert len(told(house, "volume.error")) == 1


def test_bytes_without_a_record_are_told_and_left_alone(house: House) -> None:
    stranger = new_id()
    house.outside.pools["default"].create(stranger, MIB)
    assert found(house) == [("foreign", f"default holds volume {stranger}, which has no record")]
    converge(house.outside)
    assert [item.id for item in house.outside.pools["default"].inventory()] == [stranger]


def test_one_volumes_trouble_does_not_keep_the_others_shut(house: House, alice: Caller) -> None:
    broken, whole = made(house, alice), made(house, alice)
    attached(house, alice, broken)
    attached(house, alice, whole)
    for volume in (broken, whole):
        house.target.drain(volume)
        house.target.remove(volume)
    house.outside.pools["default"].backing(broken).path.unlink()
    rebuild(house.outside)
    rebuild(house.outside)
    assert [state.volume_id for state in house.target.inventory()] == [whole]
    (event,) = told(house, "volume.export-failed")
    assert event.resource_id == broken
    assert sorted(found(house)) == [
        ("backing", f"volume {broken} has no backing"),
        ("export", "attached, but there is no target"),
    ]


def test_a_volume_that_somebody_works_on_is_left_to_them(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    attached(house, alice, volume)
    house.target.drain(volume)
    house.target.remove(volume)
    with house.outside.lock(volume, "export"):
        converge_export(house.outside, volume)
        assert house.target.inventory() == []
    converge_export(house.outside, volume)
    assert len(house.target.inventory()) == 1


def _site_reconcile(house: House, *, dry_run: bool) -> Operation:
    return house.ended(house.do(lambda s: enqueue(s, "site.reconcile", None, SITE, ("site", SITE), dry_run=dry_run)))


def test_reconcile_on_demand_tells_and_converges(house: House, alice: Caller) -> None:
    volume = made(house, alice)
    attached(house, alice, volume)
    house.target.drain(volume)
    house.target.remove(volume)
    planned = _site_reconcile(house, dry_run=True)
    assert planned.message is not None
    assert "make the export" in planned.message
    assert house.target.inventory() == []
    done = _site_reconcile(house, dry_run=False)
    assert done.state == "succeeded"
    assert len(house.target.inventory()) == 1
    assert _site_reconcile(house, dry_run=True).message == "[]"


# ---------------------------------------------------------------- sessions


def session_of(house: House, alice: Caller, attachment: UUID, portal: str) -> Initiator:
    connection, secrets = house.do(attachments.read_connection, house.keys, alice, attachment)
    (export,) = house.target.inventory()
    return Initiator(portal, export.iqn, connection.initiator, connection.username, secrets.password)


def test_more_sessions_than_there_should_be_are_an_alarm_and_then_a_fence(
    house: House, alice: Caller, portal: str
) -> None:
    house.daemon.open_portal(portal)
    volume = made(house, alice)
    attachment = attached(house, alice, volume)
    initiator, watch = session_of(house, alice, attachment, portal), SessionWatch()
    with initiator.bare():
        watch.look(house.outside)
        assert told(house, "attachment.too-many-sessions") == []
        with initiator.bare():
            watch.look(house.outside)
            (alarm,) = told(house, "attachment.too-many-sessions")
            assert (alarm.detail["sessions"], alarm.detail["addresses"]) == (2, ["127.0.0.1"])
        wait_until(lambda: len(house.target.sessions()) == 1)
        watch.look(house.outside)  # it was one moment: nothing is fenced
        assert house.open_operations() == []
        with initiator.bare():
            watch.look(house.outside)
            watch.look(house.outside)
    house.settle()
    with house.database.read() as session:
        assert session.get_one(Attachment, attachment).state == "detached"
    assert told(house, "attachment.detach")[0].actor == "system"
    invariants.check(house.database, idle=True)


def test_a_session_from_a_network_that_was_not_given_is_fenced(tmp_path: Path, database: Database, portal: str) -> None:
    allowed = {"direct": True, "direct_networks": ["10.0.0.0/8"]}
    with open_house(tmp_path / "home", database, attachments=allowed, iscsi={"portal": portal}) as house:
        house.start()
        house.daemon.open_portal(portal)
        alice = house.caller("alice")
        attachment = attached(house, alice, made(house, alice))
        with session_of(house, alice, attachment, portal).bare():
            house.chores.watch_sessions()
        (alarm,) = told(house, "attachment.foreign-network")
        assert alarm.detail["address"] == "127.0.0.1"
        house.settle()
        with house.database.read() as session:
            assert session.get_one(Attachment, attachment).state == "detached"


def test_sessions_are_not_looked_at_while_there_is_no_target(house: House) -> None:
    house.daemon.stop()
    house.chores.watch_sessions()  # logged, and tried again
    house.worker.ready.clear()
    house.chores.watch_sessions()
    house.chores.reconcile()


# ---------------------------------------------------------------- the keeper


def test_the_keeper_brings_a_dead_target_back_with_all_its_exports(house: House, alice: Caller, portal: str) -> None:
    volume = made(house, alice)
    attached(house, alice, volume)
    ready = threading.Event()
    keeper = Keeper(house.host, house.outside, ready, house.worker.stopping)
    thread = threading.Thread(target=keeper.run)
    thread.start()
    try:
        assert ready.wait(30)  # adopted
        first = house.daemon.pid
        house.daemon.kill()
        wait_until(lambda: house.daemon.pid not in (None, first) and ready.is_set())
        assert [state.volume_id for state in house.target.inventory()] == [volume]
        assert house.daemon.portals() == [portal]
    finally:
        house.worker.stopping.set()
        thread.join(30)


def test_a_target_that_cannot_be_had_is_tried_again(house: House) -> None:
    house.daemon.stop()
    shutil.rmtree(house.settings.log_dir)  # tgtd's log cannot be written
    ready = threading.Event()
    thread = threading.Thread(target=Keeper(house.host, house.outside, ready, house.worker.stopping).run)
    thread.start()
    assert not ready.wait(0.3)
    house.settings.make_directories()
    assert ready.wait(30)
    house.worker.stopping.set()
    thread.join(30)
    house.daemon.stop()
    with pytest.raises(TargetUnavailable):
        house.target.inventory()
