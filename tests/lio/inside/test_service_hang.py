"""A kernel that does not answer, seen by the whole service: it goes on with all that needs no answer, and recovers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import rtslib_fb as rtslib

from tests.lio.inside.lio_service import MIB, HeldDevice, WriteBrake
from tests.lio.inside.lio_service import held_device as held_device
from tests.lio.inside.lio_service import on_lio as on_lio
from tests.lio.inside.lio_service import plain_directory as plain_directory
from tests.support.initiator import Initiator, Writer, lost
from tests.support.service import Api, RunningService, initiator_of, running, wait_until

ONE, TWO, THREE = (f"iqn.2026-11.org.example:{name}" for name in ("one", "two", "three"))
#: LIO's deadline for the kernel is 20 s, and this kernel has one busy CPU.
LONG = 120.0


@pytest.fixture
def service(plain_directory: Path, tmp_path: Path) -> Iterator[RunningService]:
    """Two pools: `default` is well, and `sick` lies on a device that can be held."""
    environment = {
        "STRATUS_POOLS__DEFAULT__PATH": str(tmp_path / "home" / "pool"),
        "STRATUS_POOLS__SICK__PATH": str(plain_directory),
        "STRATUS_WORKER__POOL_INTERVAL": "0.5",
    }
    with running(tmp_path / "home", environment) as started:
        yield started


@contextmanager
def hung(one: Initiator, device: HeldDevice) -> Iterator[None]:
    """Somebody deletes an ACL whose session has a write in flight, as targetcli does: to list the ACLs is to wait."""
    group = rtslib.TPG(rtslib.Target(rtslib.FabricModule("iscsi"), one.iqn, mode="lookup"), 1, mode="lookup")
    acl = rtslib.NodeACL(group, one.initiator, mode="lookup")
    stuck = threading.Thread(target=acl.delete, daemon=True)
    held = WriteBrake(Path(), "write", device)
    with Writer(one, depth=1):
        held.on()
        try:
            wait_until(held.holds, LONG, "a write in flight")
            stuck.start()
            stuck.join(0.5)
            assert stuck.is_alive(), "the kernel is not stuck"
            yield
        finally:
            held.off()
        stuck.join(LONG)
        assert not stuck.is_alive()


def readiness(api: Api) -> str:
    answer = api.get("/readyz")
    return "" if answer.status_code == 200 else str(answer.json()["detail"])


def test_the_service_answers_the_others_go_on_and_all_is_well_again(
    service: RunningService, held_device: HeldDevice
) -> None:
    api = service.admin
    sick = api.attach(api.make_volume(16 * MIB, pool="sick")["id"], ONE)
    beside, two = service.attached(TWO)
    waiting, goner = (api.make_volume(16 * MIB)["id"] for _ in range(2))
    worker = service.worker_pid()
    with Writer(two) as bystander:
        with hung(initiator_of(sick), held_device):
            wait_until(lambda: "target" in readiness(api), LONG, "word that the target is not there")
            assert "the kernel has not answered" in (service.home / "log/worker.log").read_text()
            bystander.wait_rounds(2)
            assert {each["id"] for each in api.show("/v1/volumes")["items"]} >= {sick["volume_id"], waiting, goner}
            copied = api.wait_operation(api.start_operation("/v1/volumes", volume=waiting), LONG)
            assert copied["state"] == "succeeded"
            wish = {"instance_id": "test", "node": "test", "initiator": THREE}
            asked = [
                api.start_operation(f"/v1/volumes/{waiting}/attachments", **wish),
                api.start_operation(f"/v1/attachments/{sick['id']}", "DELETE"),
                api.start_operation(f"/v1/volumes/{goner}", "DELETE"),
            ]
            bystander.wait_rounds(2)
            assert api.show(f"/v1/attachments/{sick['id']}")["state"] == "detaching"
            for operation in asked[:2]:
                assert api.show(f"/v1/operations/{operation}")["state"] in ("queued", "running")
            assert readiness(api)
        for operation in asked:
            assert api.wait_operation(operation, LONG)["state"] == "succeeded"
        wait_until(lambda: not readiness(api), LONG, "the target")
        bystander.wait_rounds(2)
        assert bystander.stop() == []
    assert service.worker_pid() == worker
    assert lost(service.backing(beside["volume_id"]), bystander.expected) == []
    assert initiator_of(sick).login_error() is not None
    (attached,) = api.show(f"/v1/volumes/{waiting}")["attachments"]
    connection = api.show(f"/v1/attachments/{attached['id']}/connection")
    initiator_of({"initiator": THREE, "connection": connection}).write(0, 1, MIB)
    again = initiator_of(api.attach(sick["volume_id"], TWO))
    again.write(0, 2, MIB)
    assert service.storage("reconcile", "--dry-run").stdout == ""
