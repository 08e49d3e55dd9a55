"""Drift made behind the service's back: printed by a dry run, mended by a reconcile, fenced where it is dangerous."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.config import read_effective
from app.worker_process import tgt_host
from iscsi.target import Connection, Credentials, Export
from iscsi.tgt import TgtTarget
from iscsi.tgt_ipc import TgtIpc
from tests.support.initiator import Initiator, InitiatorError
from tests.support.service import Api, RunningService, free_port, initiator_of, running, wait_until

MIB = 1 << 20
HOST = "iqn.2004-10.org.example:host"
INTRUDER = "iqn.2004-10.org.example:intruder"
FOREIGN = "iqn.2026-11.org.example.foreign"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Looks at sessions often, and at drift only when it is told to."""
    environment = {
        "STRATUS_WORKER__POOL_INTERVAL": "0.5",
        "STRATUS_WORKER__RECONCILE_INTERVAL": "3600",
        "STRATUS_SERVER__PROCESSES": "1",
    }
    with running(tmp_path_factory.mktemp("drift") / "home", environment) as started:
        yield started


@dataclass
class BehindItsBack:
    """The service's own tgtd in the hands of somebody else."""

    service: RunningService

    @property
    def ipc(self) -> TgtIpc:
        return tgt_host(read_effective(self.service.home / "run" / "effective.json")).daemon.ipc

    def target(self, prefix: str = "") -> TgtTarget:
        settings = read_effective(self.service.home / "run" / "effective.json")
        return TgtTarget(self.ipc, prefix or settings.iscsi.iqn_prefix)

    def state(self, volume: str) -> Any:
        """What the target has for the volume, or None."""
        return next((each for each in self.target().inventory() if each.volume_id == UUID(volume)), None)

    def remove(self, volume: str) -> None:
        target = self.target()
        wait_until(lambda: not target.drain(UUID(volume)), what="the end of the sessions")
        target.remove(UUID(volume))

    def make(self, path: Path, tid: int, prefix: str = "") -> UUID:
        """A target for a volume that no record knows."""
        path.touch()
        os.truncate(path, MIB)
        connection = Connection(INTRUDER, Credentials("somebody", "a-secret-of-theirs"))
        export = Export(uuid4(), tid, path, MIB, False, (connection,))
        self.target(prefix).ensure_export(export)
        return export.volume_id


@pytest.fixture
def behind(service: RunningService) -> BehindItsBack:
    return BehindItsBack(service)


@pytest.fixture
def volume(service: RunningService) -> Iterator[str]:
    """The id of a volume that is gone after the test, with its attachments."""
    made = service.admin.make_volume(8 * MIB)["id"]
    yield made
    for attachment in live(service.admin, made):
        service.admin.detach(attachment)
    assert service.admin.delete(f"/v1/volumes/{made}").status_code == 204


def live(api: Api, volume: str) -> list[str]:
    return [each["id"] for each in api.show(f"/v1/volumes/{volume}")["attachments"] if each["state"] != "detached"]


def reconcile(service: RunningService, *options: str, code: int = 0) -> str:
    """What it prints: a line for each difference; `code` is 1 when one of them could not be mended."""
    return service.storage("reconcile", *options, code=code).stdout


def test_nothing_is_said_when_nothing_differs(service: RunningService, volume: str) -> None:
    service.admin.attach(volume, HOST)
    assert reconcile(service, "--dry-run") == ""
    done = service.command("stratus-storage", "reconcile")
    assert (done.stdout, done.stderr.strip()) == ("", "0 differences")


def test_a_target_that_was_deleted_is_made_again_with_the_same_secret(
    service: RunningService, behind: BehindItsBack, volume: str
) -> None:
    initiator = initiator_of(service.admin.attach(volume, HOST))
    initiator.write(0, 0x21, MIB)
    page = initiator.vpd(0x83)
    behind.remove(volume)
    assert initiator.login_error() is not None
    line = f"export   {volume} attached, but there is no target -> make the export\n"
    dry = service.command("stratus-storage", "reconcile", "--dry-run")
    assert dry.stdout == line
    assert dry.stderr == "1 differences (nothing was changed)\n"
    assert behind.state(volume) is None
    assert reconcile(service) == line
    initiator.read(0, MIB, 0x21)
    assert initiator.vpd(0x83) == page
    assert reconcile(service) == ""


def test_a_target_that_nobody_asked_for_is_removed(
    service: RunningService, behind: BehindItsBack, tmp_path: Path
) -> None:
    orphan = str(behind.make(tmp_path / "orphan.raw", 901))
    line = f"export   {orphan} a target, but nobody is attached -> drain and remove it\n"
    assert reconcile(service, "--dry-run") == line
    assert behind.state(orphan) is not None
    assert reconcile(service) == line
    assert behind.state(orphan) is None
    assert (tmp_path / "orphan.raw").exists()
    assert reconcile(service) == ""


def test_a_foreign_target_is_told_and_left_alone(
    service: RunningService, behind: BehindItsBack, tmp_path: Path
) -> None:
    theirs = behind.make(tmp_path / "foreign.raw", 902, FOREIGN)
    try:
        line = f"foreign  {'-':36} {FOREIGN}:{theirs} is not ours -> leave it alone\n"
        assert reconcile(service, "--dry-run") == line
        assert reconcile(service) == line
        assert behind.target().foreign() == [f"{FOREIGN}:{theirs}"]
        assert behind.target(FOREIGN).inventory()[0].complete
    finally:
        behind.target(FOREIGN).remove(theirs)


@pytest.mark.parametrize("meddle", ["initiator taken", "initiator added", "account added", "account taken"])
def test_rights_that_were_changed_are_put_right(
    service: RunningService, behind: BehindItsBack, volume: str, meddle: str
) -> None:
    initiator = initiator_of(service.admin.attach(volume, HOST))
    before = behind.state(volume)
    what, how = meddle.split()
    if what == "initiator":
        act = behind.ipc.unbind_initiator if how == "taken" else behind.ipc.bind_initiator
        act(before.tid, HOST if how == "taken" else INTRUDER)
    elif how == "taken":
        behind.ipc.unbind_account(before.tid, initiator.username)
    else:
        behind.ipc.create_account("intruder", "a-secret-of-theirs")
        behind.ipc.bind_account(before.tid, "intruder")
    assert behind.state(volume) != before
    layers = "initiators" if what == "initiator" else "CHAP names"
    line = f"export   {volume} differs from the database in: {layers} -> converge these layers\n"
    assert reconcile(service, "--dry-run") == line
    assert behind.state(volume) != before
    assert reconcile(service) == line
    assert behind.state(volume) == before
    initiator.write(0, 0x31, MIB)
    assert reconcile(service) == ""


def test_bytes_without_a_record_are_told_and_kept(service: RunningService) -> None:
    stray = service.backing(str(uuid4()))
    stray.write_bytes(b"somebody's")
    line = f"foreign  {'-':36} default holds volume {stray.stem}, which has no record -> leave it alone\n"
    try:
        assert reconcile(service) == line
        assert stray.read_bytes() == b"somebody's"
    finally:
        stray.unlink()


def test_a_volume_without_its_bytes_is_in_error_until_they_are_back(service: RunningService, volume: str) -> None:
    api = service.admin
    path, aside = service.backing(volume), service.home / "aside.raw"
    path.rename(aside)
    line = f"backing  {volume} volume {volume} has no backing -> mark it as in error\n"
    assert reconcile(service, "--dry-run") == line
    assert api.show(f"/v1/volumes/{volume}")["state"] == "available"
    assert reconcile(service) == line
    broken = api.show(f"/v1/volumes/{volume}")
    assert (broken["state"], broken["error"]) == ("error", f"volume {volume} has no backing")
    assert api.events("volume.error", volume)[0]["detail"] == {"cause": f"volume {volume} has no backing"}
    wanted = {"instance_id": "i", "node": "n", "initiator": HOST, "mode": "rw"}
    answer = api.post(f"/v1/volumes/{volume}/attachments", json=wanted)
    assert (answer.status_code, answer.json()["code"]) == (409, "volume-not-available")
    still = api.post(f"/v1/volumes/{volume}/reset-state", json={}).json()
    assert still["state"] == "error"
    assert "no volume" in still["error"]
    aside.rename(path)
    again = api.post(f"/v1/volumes/{volume}/reset-state", json={}).json()
    assert (again["state"], again["error"]) == ("available", None)
    initiator_of(api.attach(volume, HOST)).write(0, 0x41, MIB)
    assert reconcile(service) == ""


def test_a_volume_that_shrank_is_in_error_until_it_is_whole(service: RunningService, volume: str) -> None:
    api = service.admin
    os.truncate(service.backing(volume), 4 * MIB)
    assert api.post(f"/v1/volumes/{volume}/reset-state", json={}).json()["state"] == "error"
    os.truncate(service.backing(volume), 8 * MIB)
    assert api.post(f"/v1/volumes/{volume}/reset-state", json={}).json()["state"] == "available"
    user = service.user("shrinker")
    answer = user.post(f"/v1/volumes/{volume}/reset-state", json={})
    assert answer.status_code == 403


def test_an_attached_volume_that_lost_its_bytes_and_target_is_whole_again_once_they_are_back(
    service: RunningService, behind: BehindItsBack, volume: str
) -> None:
    """The export's trouble is told in the record as long as it lasts."""
    api = service.admin
    initiator = initiator_of(api.attach(volume, HOST))
    path, aside = service.backing(volume), service.home / "aside.raw"
    behind.remove(volume)
    path.rename(aside)
    assert "could not be done: pool default: no volume" in reconcile(service, code=1)
    assert api.show(f"/v1/volumes/{volume}")["state"] == "error"
    assert initiator.login_error() is not None
    aside.rename(path)
    again = api.post(f"/v1/volumes/{volume}/reset-state", json={}).json()
    assert again["state"] == "in-use"
    reconcile(service)
    initiator.write(0, 0x51, MIB)
    assert api.show(f"/v1/volumes/{volume}")["error"] is None


@pytest.fixture
def squatted(
    service: RunningService, behind: BehindItsBack, volume: str, tmp_path: Path
) -> Iterator[tuple[Initiator, str, Callable[[], None]]]:
    """An attached volume whose target's number is somebody else's: its initiator, what is wrong, how it ends."""
    initiator = initiator_of(service.admin.attach(volume, HOST))
    number = behind.state(volume).tid
    behind.remove(volume)
    squatter = behind.make(tmp_path / "foreign.raw", number, FOREIGN)
    end = partial(behind.target(FOREIGN).remove, squatter)
    try:
        yield initiator, f"create target: number {number} belongs to {FOREIGN}:{squatter}", end
    finally:
        end()


def test_an_export_that_cannot_be_made_is_told_as_long_as_that_lasts(
    service: RunningService, volume: str, squatted: tuple[Initiator, str, Callable[[], None]]
) -> None:
    api, (initiator, trouble, end) = service.admin, squatted
    assert f"could not be done: {trouble}" in reconcile(service, code=1)
    assert f"could not be done: {trouble}" in reconcile(service, code=1)
    record = api.show(f"/v1/volumes/{volume}")
    assert (record["state"], record["error"]) == ("in-use", trouble)
    assert len(api.events("volume.export-failed", volume)) == 1
    end()
    reconcile(service)
    initiator.write(0, 0x52, MIB)
    assert api.show(f"/v1/volumes/{volume}")["error"] is None
    assert len(api.events("volume.export-restored", volume)) == 1


def test_an_export_that_cannot_be_made_is_forgotten_with_its_attachment(
    service: RunningService, volume: str, squatted: tuple[Initiator, str, Callable[[], None]]
) -> None:
    reconcile(service, code=1)
    service.admin.detach(live(service.admin, volume)[0])
    record = service.admin.show(f"/v1/volumes/{volume}")
    assert (record["state"], record["error"]) == ("available", None)


def test_a_connection_used_from_two_places_is_told_and_then_fenced(service: RunningService, volume: str) -> None:
    api = service.admin
    attachment = api.attach(volume, HOST)
    initiator = initiator_of(attachment)
    with initiator.bare(), initiator.bare():
        alarm = wait_until(lambda: api.events("attachment.too-many-sessions", attachment["id"]), what="the alarm")[-1]
        assert alarm["detail"] == {"sessions": 2, "addresses": ["127.0.0.1"], "volume": volume}
        wait_until(lambda: api.show(f"/v1/volumes/{volume}")["state"] == "available", what="the fence")
    told = [event["kind"] for event in reversed(api.events(resource=attachment["id"]))]
    assert told[:2] == ["attachment.attach", "attachment.attached"]
    assert told[-2:] == ["attachment.detach", "attachment.detached"]
    fence = api.events("attachment.detach", attachment["id"])[0]
    assert (fence["actor"], fence["detail"]["reason"]) == ("system", "attachment.too-many-sessions")
    assert initiator.login_error() is not None
    assert api.get(f"/v1/attachments/{attachment['id']}/connection").json()["code"] == "attachment-ended"


def test_one_session_is_never_told(service: RunningService, volume: str) -> None:
    """The very next connection that is used twice is: the watch has looked at this one in between."""
    api = service.admin
    attachment = api.attach(volume, HOST)
    with initiator_of(attachment).bare():
        other = api.make_volume(8 * MIB)["id"]
        cloned = api.attach(other, INTRUDER)
        with initiator_of(cloned).bare(), initiator_of(cloned).bare():
            wait_until(lambda: api.show(f"/v1/volumes/{other}")["state"] == "available", what="the fence")
        assert api.delete(f"/v1/volumes/{other}").status_code == 204
        assert api.events("attachment.too-many-sessions", attachment["id"]) == []
        assert api.show(f"/v1/attachments/{attachment['id']}")["state"] == "attached"


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Direct attachments have a portal of their own, and come from one address."""
    environment = {
        "STRATUS_WORKER__POOL_INTERVAL": "0.5",
        "STRATUS_SERVER__PROCESSES": "1",
        "STRATUS_ATTACHMENTS__DIRECT_PORTAL": f"127.0.0.1:{free_port()}",
        "STRATUS_ATTACHMENTS__DIRECT_NETWORKS": '["127.0.0.1/32"]',
    }
    with running(tmp_path_factory.mktemp("restricted") / "home", environment) as started:
        yield started


def test_direct_attachments_have_their_own_portal_and_networks(restricted: RunningService) -> None:
    user = restricted.user("carol")
    volume = user.make_volume(8 * MIB)["id"]
    attachment = user.attach(volume, HOST)
    initiator = initiator_of(attachment)
    assert initiator.portal == restricted.environment["STRATUS_ATTACHMENTS__DIRECT_PORTAL"] != restricted.portal
    initiator.write(0, 0x61, MIB)
    with initiator.bare() as inside, ExitStack() as outside:
        foreign = outside.enter_context(initiator.bare("127.0.0.2"))
        assert len(foreign.command(b"\x9e\x10" + bytes(8) + b"\0\0\0\x20\0\0", 32)) == 32
        wait_until(lambda: user.show(f"/v1/volumes/{volume}")["state"] == "available", what="the fence")
        for session in (inside, foreign):
            with pytest.raises((InitiatorError, OSError)):
                session.command(bytes(6), 0)
    alarm = restricted.admin.events("attachment.foreign-network", attachment["id"])[0]
    assert alarm["detail"] == {"address": "127.0.0.2", "volume": volume}
    assert initiator.login_error() is not None
    again = initiator_of(user.attach(volume, HOST))
    again.read(0, MIB, 0x61)


def test_nodes_use_the_sites_portal_from_anywhere(restricted: RunningService) -> None:
    node = restricted.node("hypervisor", "iqn.2004-10.org.example:hypervisor")
    user = restricted.user("dave")
    volume, watched = user.make_volume(8 * MIB)["id"], user.make_volume(8 * MIB)["id"]
    attachment = node.attach(volume, "iqn.2004-10.org.example:hypervisor", node="hypervisor")
    initiator = initiator_of(attachment)
    assert initiator.portal == restricted.portal
    with initiator.bare("127.0.0.2"):
        stranger = initiator_of(user.attach(watched, INTRUDER))
        with stranger.bare("127.0.0.2"):  # when this one is fenced, the watch has seen the other too
            wait_until(lambda: user.show(f"/v1/volumes/{watched}")["state"] == "available", what="the fence")
        assert node.show(f"/v1/attachments/{attachment['id']}")["state"] == "attached"
    assert restricted.admin.events("attachment.foreign-network", attachment["id"]) == []
