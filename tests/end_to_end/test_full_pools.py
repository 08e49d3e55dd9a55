"""Pools that are full, low on space, or gone: refused with a code, told by an alarm, and nothing is harmed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from app.config import read_effective
from app.db import Database
from tests.support.filesystems import SMALLEST, image_of, mounted
from tests.support.initiator import Initiator, InitiatorError
from tests.support.invariants import check
from tests.support.service import Api, RunningService, initiator_of, running, wait_until

MIB = 1 << 20
SIZE = 64 * MIB
HOST = "iqn.2004-10.org.example:host"
POOLS = """
default_pool = "over"

[pools.over]
path = "{over}"
overcommit_ratio = 2
low_space_percent = 0

[pools.low]
path = "{low}"
overcommit_ratio = 100
low_space_percent = 50

[pools.full]
path = "{full}"
overcommit_ratio = 100
low_space_percent = 0

[pools.gone]
path = "{gone}"
overcommit_ratio = 1000
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A small file system for each pool; `gone` outlives its being unmounted."""
    base = tmp_path_factory.mktemp("places")
    with ExitStack() as stack:
        found = {}
        for name in ("over", "low", "full"):
            (base / name).mkdir()
            found[name] = stack.enter_context(mounted("tmpfs", SIZE, base / name))
        found["gone"] = stack.enter_context(mounted("xfs", SMALLEST["xfs"], base))
        yield found


@pytest.fixture(scope="module")
def service(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    home = tmp_path_factory.mktemp("full") / "home"
    home.mkdir()
    (home / "config.toml").write_text(POOLS.format(**places))
    with running(home, {"STRATUS_WORKER__POOL_INTERVAL": "0.3", "STRATUS_SERVER__PROCESSES": "1"}) as started:
        yield started


def pool(service: RunningService, name: str) -> dict[str, Any]:
    pools: list[dict[str, Any]] = service.admin.get("/v1/pools").json()["items"]
    return next(each for each in pools if each["name"] == name)


def quota(service: RunningService, user: str) -> tuple[int, int]:
    """Bytes and records the user is charged for."""
    found = service.admin.get(f"/v1/quotas/{user}").json()
    return found["used_size"], found["used_count"]


def refused(answer: requests.Response, code: str) -> None:
    assert (answer.status_code, answer.json()["code"]) == (409, code), answer.text


def raw_files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*.raw")}


def use(api: Api, volume: str) -> Initiator:
    """An initiator attached to the volume."""
    return initiator_of(api.attach(volume, HOST))


def detach_all(api: Api, volume: str) -> None:
    for attachment in api.get(f"/v1/volumes/{volume}").json()["attachments"]:
        api.detach(attachment["id"])


def assert_books_agree(service: RunningService) -> None:
    """Every counter is what the records sum up to, and nothing is half-way."""
    settings = read_effective(service.home / "run" / "effective.json")
    database = Database(settings.database_url, 2)
    check(database, idle=True)
    database.close()


def test_a_pool_promises_no_more_than_its_ratio(service: RunningService, places: dict[str, Path]) -> None:
    alice = service.user("alice")
    first = alice.make_volume(100 * MIB, pool="over")
    before = raw_files(places["over"])
    bodies: list[dict[str, Any]] = [{"size": 100 * MIB, "pool": "over"}, {"volume": first["id"]}]
    for wanted in bodies:
        refused(alice.post("/v1/volumes", json=wanted), "pool-overcommitted")
        plan = alice.post("/v1/volumes", json=wanted, params={"dry_run": "true"}).json()
        assert not plan["allowed"]
        assert plan["conflicts"][0]["code"] == "pool-overcommitted"
    refused(alice.post(f"/v1/volumes/{first['id']}/snapshots", json={}), "pool-overcommitted")
    refused(alice.patch(f"/v1/volumes/{first['id']}", json={"size": 200 * MIB}), "pool-overcommitted")
    assert quota(service, "alice") == (100 * MIB, 1)
    assert pool(service, "over")["promised"] == 100 * MIB
    assert raw_files(places["over"]) == before == {f"volumes/{first['id']}.raw"}
    assert alice.get(f"/v1/volumes/{first['id']}").json()["state"] == "available"
    assert alice.delete(f"/v1/volumes/{first['id']}").status_code == 204
    second = alice.make_volume(128 * MIB, pool="over")
    assert alice.delete(f"/v1/volumes/{second['id']}").status_code == 204
    assert quota(service, "alice") == (0, 0)
    assert_books_agree(service)


def test_an_alarm_tells_when_guests_may_meet_a_full_pool(service: RunningService) -> None:
    admin = service.admin
    wait_until(lambda: pool(service, "over")["alarm"] is None, what="the end of an earlier alarm")
    volume = admin.make_volume(120 * MIB, pool="over")
    alarm = wait_until(lambda: pool(service, "over")["alarm"], what="the alarm")
    assert "they may meet a full pool" in alarm
    told = next(event for event in admin.events(kind="pool.alarm") if event["detail"]["pool"] == "over")
    assert told["detail"]["promised"] == 120 * MIB
    assert told["actor"] == "system"
    assert admin.delete(f"/v1/volumes/{volume['id']}").status_code == 204
    wait_until(lambda: pool(service, "over")["alarm"] is None, what="the end of the alarm")
    assert any(event["detail"]["pool"] == "over" for event in admin.events(kind="pool.alarm-over"))


def test_a_pool_low_on_space_takes_no_new_work_and_serves_what_it_has(
    service: RunningService, places: dict[str, Path]
) -> None:
    bob = service.user("bob")
    volume = bob.make_volume(8 * MIB, pool="low")
    snapshot = bob.post(f"/v1/volumes/{volume['id']}/snapshots", json={}).json()
    filler = places["low"] / "filler"
    filler.write_bytes(bytes(40 * MIB))
    alarm = wait_until(lambda: pool(service, "low")["alarm"], what="the alarm")
    assert "no new work" in alarm
    refused(bob.post("/v1/volumes", json={"size": 8 * MIB, "pool": "low"}), "pool-low-space")
    refused(bob.post("/v1/volumes", json={"volume": volume["id"]}), "pool-low-space")
    refused(bob.post("/v1/volumes", json={"snapshot": snapshot["id"]}), "pool-low-space")
    refused(bob.post(f"/v1/volumes/{volume['id']}/snapshots", json={}), "pool-low-space")
    refused(bob.patch(f"/v1/volumes/{volume['id']}", json={"size": 16 * MIB}), "pool-low-space")
    assert quota(service, "bob") == (16 * MIB, 2)
    initiator = use(bob, volume["id"])
    initiator.write(0, 0x17, 1 * MIB)
    initiator.read(0, 1 * MIB, 0x17)
    detach_all(bob, volume["id"])
    filler.unlink()
    wait_until(lambda: pool(service, "low")["alarm"] is None, what="the end of the alarm")
    made = bob.make_volume(8 * MIB, pool="low")
    for path in (f"volumes/{made['id']}", f"snapshots/{snapshot['id']}", f"volumes/{volume['id']}"):
        assert bob.delete(f"/v1/{path}").status_code == 204
    assert quota(service, "bob") == (0, 0)
    assert_books_agree(service)


@pytest.fixture
def half_full(service: RunningService) -> Iterator[tuple[Api, str, str]]:
    """A user, a volume with 20 MiB of 0x11 in a pool of 64 MiB, and its snapshot of the same size; 24 MiB are free."""
    api = Api(service.base, service.admin_token)
    volume = api.make_volume(48 * MIB, pool="full")["id"]
    use(api, volume).write(0, 0x11, 20 * MIB)
    detach_all(api, volume)
    snapshot = api.post(f"/v1/volumes/{volume}/snapshots", json={}).json()["id"]
    yield api, volume, snapshot
    assert api.delete(f"/v1/snapshots/{snapshot}").status_code == 204
    assert api.delete(f"/v1/volumes/{volume}").status_code == 204
    assert_books_agree(service)


@contextmanager
def filled(place: Path, left: int) -> Iterator[None]:
    """All but `left` bytes of the file system are taken by something else."""
    filler = place / "filler"
    try:
        filler.write_bytes(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize - left))
        yield
    finally:
        filler.unlink()


def test_a_copy_that_meets_a_full_pool_leaves_nothing(
    service: RunningService, places: dict[str, Path], half_full: tuple[Api, str, str]
) -> None:
    api, volume, snapshot = half_full
    before, charged = raw_files(places["full"]), quota(service, "admin")
    with filled(places["full"], 8 * MIB):
        refused(api.post("/v1/volumes", json={"volume": volume, "name": "broken"}), "pool-full")
        refused(api.post("/v1/volumes", json={"snapshot": snapshot, "name": "broken"}), "pool-full")
        refused(api.post(f"/v1/volumes/{volume}/snapshots", json={"name": "broken"}), "pool-full")
        assert raw_files(places["full"]) == before
    volumes = api.get("/v1/volumes", params={"name": "broken"}).json()["items"]
    snapshots = api.get("/v1/snapshots", params={"name": "broken"}).json()["items"]
    assert [record["state"] for record in volumes + snapshots] == ["error"] * 3
    assert all("no space left" in record["error"] for record in volumes + snapshots)
    assert quota(service, "admin") == (charged[0] + 3 * 48 * MIB, charged[1] + 3)
    paths = [f"volumes/{each['id']}" for each in volumes] + [f"snapshots/{each['id']}" for each in snapshots]
    for path in paths:
        assert api.delete(f"/v1/{path}").status_code == 204
    assert quota(service, "admin") == charged
    use(api, volume).read(0, 20 * MIB, 0x11)
    detach_all(api, volume)


def test_a_revert_that_meets_a_full_pool_leaves_the_volume_as_it_was(
    places: dict[str, Path], half_full: tuple[Api, str, str]
) -> None:
    api, volume, snapshot = half_full
    use(api, volume).write(0, 0x22, 1 * MIB)
    detach_all(api, volume)
    before = raw_files(places["full"])
    with filled(places["full"], 8 * MIB):
        refused(api.post(f"/v1/volumes/{volume}/revert", json={"snapshot": snapshot}), "pool-full")
    assert raw_files(places["full"]) == before
    assert api.get(f"/v1/volumes/{volume}").json()["state"] == "available"
    use(api, volume).read(0, 1 * MIB, 0x22)
    detach_all(api, volume)
    assert api.post(f"/v1/volumes/{volume}/revert", json={"snapshot": snapshot}).status_code == 200
    use(api, volume).read(0, 1 * MIB, 0x11)
    detach_all(api, volume)


def test_a_guest_that_meets_a_full_pool_gets_an_error_and_goes_on_when_there_is_room(
    places: dict[str, Path], half_full: tuple[Api, str, str]
) -> None:
    api, volume, _ = half_full
    initiator = use(api, volume)
    with filled(places["full"], 0):
        with pytest.raises(InitiatorError):
            initiator.write(24 * MIB, 0x33, 4 * MIB)
        initiator.read(0, 20 * MIB, 0x11)
        initiator.write(0, 0x44, 1 * MIB)  # it has these blocks already
    initiator.write(24 * MIB, 0x33, 4 * MIB)
    initiator.read(24 * MIB, 4 * MIB, 0x33)
    initiator.read(0, 1 * MIB, 0x44)
    detach_all(api, volume)


def unmount(point: Path) -> None:
    """As soon as nobody looks into it."""
    wait_until(lambda: subprocess.run(["umount", point], capture_output=True).returncode == 0, what="the unmount")


@contextmanager
def unmounted(point: Path) -> Iterator[None]:
    unmount(point)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "loop", image_of(point), point], check=True)


def test_a_pool_whose_file_system_is_gone_is_left_alone_until_it_is_back(
    service: RunningService, places: dict[str, Path]
) -> None:
    api, point = service.admin, places["gone"]
    volume = api.make_volume(16 * MIB, pool="gone")["id"]
    use(api, volume).write(0, 0x55, 1 * MIB)
    detach_all(api, volume)
    charged = quota(service, "admin")
    with unmounted(point):
        wait_until(lambda: pool(service, "gone")["state"] == "unusable", what="the loss")
        refused(api.post("/v1/volumes", json={"size": 8 * MIB, "pool": "gone"}), "pool-unusable")
        refused(api.post("/v1/volumes", json={"volume": volume}), "pool-unusable")
        assert service.command("stratus-storage", "reconcile").returncode == 0
        service.restart()
        wait_until(lambda: "is its file system mounted?" in pool(service, "gone")["reason"], what="the reason")
        refused(api.post("/v1/volumes", json={"size": 8 * MIB, "pool": "gone"}), "pool-unusable")
        assert api.get(f"/v1/volumes/{volume}").json()["state"] == "available"
        assert os.listdir(point) == []
        assert quota(service, "admin") == charged
    wait_until(lambda: pool(service, "gone")["state"] == "active", what="its return")
    assert pool(service, "gone")["reason"] is None
    kinds = [e["kind"] for e in api.get("/v1/events").json()["items"] if e["detail"].get("pool") == "gone"]
    assert kinds[0] == "pool.active"
    assert "pool.unusable" in kinds
    use(api, volume).read(0, 1 * MIB, 0x55)
    detach_all(api, volume)
    made = api.make_volume(8 * MIB, pool="gone")["id"]
    for each in (made, volume):
        assert api.delete(f"/v1/volumes/{each}").status_code == 204
    assert_books_agree(service)


def test_an_attach_to_a_lost_pool_is_refused_and_leaves_the_volume_free(
    service: RunningService, places: dict[str, Path]
) -> None:
    api = service.admin
    volume = api.make_volume(16 * MIB, pool="gone")["id"]
    wanted = {"instance_id": "i", "node": "n", "initiator": HOST, "mode": "rw"}
    with unmounted(places["gone"]):
        wait_until(lambda: pool(service, "gone")["state"] == "unusable", what="the loss")
        answer = api.post(f"/v1/volumes/{volume}/attachments", json=wanted)
        assert (answer.status_code, answer.json()["code"]) == (503, "pool-unusable")
        wait_until(lambda: api.get(f"/v1/volumes/{volume}").json()["state"] == "available", what="its release")
        answer = api.delete(f"/v1/volumes/{volume}")
        assert (answer.status_code, answer.json()["code"]) == (503, "pool-unusable")
        assert os.listdir(places["gone"]) == []
    wait_until(lambda: pool(service, "gone")["state"] == "active", what="its return")
    assert api.delete(f"/v1/volumes/{volume}").status_code == 204  # what could not be deleted can be asked for again
    assert_books_agree(service)
