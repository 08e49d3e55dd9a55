"""The worker dies in the middle of an outside act: its successor ends the operation, once, and nothing is left over."""

from __future__ import annotations

import signal
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.initiator import Writer
from tests.support.service import RunningService, initiator_of, wait_until
from tests.support.shim import Brake

ONE, TWO = "iqn.2026-11.org.example:one", "iqn.2026-11.org.example:two"
MIB = 1 << 20
PutOn = Callable[[str], Brake]
DEATHS = pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


@contextmanager
def worker_dies(service: RunningService, brake: Brake, number: int) -> Iterator[None]:
    """What the block asks for begins, is held by the brake, and its worker dies there (or stops, and is killed)."""
    before = service.worker_pid()
    yield
    wait_until(brake.holds, 60, "the act")
    service.kill(before, number)
    brake.off()
    wait_until(lambda: service.worker_pid() != before, 60, "another worker")


def written(service: RunningService) -> str:
    """A detached volume with a MiB of 0x5a at its start."""
    attachment, one = service.attached(ONE)
    one.write(0, 0x5A, MIB)
    service.admin.detach(attachment["id"])
    return str(attachment["volume_id"])


def read_back(service: RunningService, volume: str) -> None:
    attachment = service.admin.attach(volume, TWO)
    initiator_of(attachment).read(0, MIB, 0x5A)
    service.admin.detach(attachment["id"])


def attempts(service: RunningService, operation: str) -> int:
    with closing(sqlite3.connect(f"file:{service.home}/stratus.db?mode=ro", uri=True)) as database:
        query = "SELECT attempt FROM operations WHERE id = ?"
        return int(database.execute(query, [uuid.UUID(operation).hex]).fetchone()[0])


def done_once(service: RunningService, operation: str, told: str, pool: Path) -> dict[str, Any]:
    """The operation succeeded at its second attempt, was told once, and staging is empty."""
    ended = service.admin.wait_operation(operation)
    assert (ended["state"], ended["error"]) == ("succeeded", None)
    assert attempts(service, operation) == 2
    assert len(service.admin.events(told, ended["resource"]["id"])) == 1
    assert list((pool / "staging").iterdir()) == []
    return ended


@DEATHS
def test_a_create_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, number: int) -> None:
    with worker_dies(braked, brake("sync"), number):
        operation = braked.admin.start_operation("/v1/volumes", size=64 * MIB)
    volume = done_once(braked, operation, "volume.created", plain_directory)["resource"]["id"]
    assert (plain_directory / "volumes" / f"{volume}.raw").stat().st_size == 64 * MIB
    assert braked.admin.show(f"/v1/volumes/{volume}")["state"] == "available"


@DEATHS
def test_a_clone_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, number: int) -> None:
    source = written(braked)
    used = braked.admin.show("/v1/quotas/admin")
    with worker_dies(braked, brake("copy"), number):
        operation = braked.admin.start_operation("/v1/volumes", volume=source)
    clone = done_once(braked, operation, "volume.created", plain_directory)["resource"]["id"]
    charged = braked.admin.show("/v1/quotas/admin")
    assert charged["used_count"] == used["used_count"] + 1
    assert charged["used_size"] == used["used_size"] + 64 * MIB
    read_back(braked, clone)
    read_back(braked, source)  # nobody is counted as copying it any more


@DEATHS
def test_a_revert_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, number: int) -> None:
    volume = written(braked)
    snapshot = braked.admin.post(f"/v1/volumes/{volume}/snapshots", json={}).json()["id"]
    attachment = braked.admin.attach(volume, ONE)
    initiator_of(attachment).write(0, 0x11, 2 * MIB)
    braked.admin.detach(attachment["id"])
    with worker_dies(braked, brake("copy"), number):
        operation = braked.admin.start_operation(f"/v1/volumes/{volume}/revert", snapshot=snapshot)
    done_once(braked, operation, "volume.reverted", plain_directory)
    read_back(braked, volume)


@DEATHS
def test_a_fence_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, number: int) -> None:
    attachment, one = braked.attached(ONE)
    with Writer(one, depth=1) as writer:
        writer.wait_rounds(1)
        with worker_dies(braked, brake("write"), number):
            operation = braked.admin.start_operation(f"/v1/attachments/{attachment['id']}", "DELETE")
        ended = braked.admin.wait_operation(operation)
        assert ended["state"] == "succeeded"
        after = (plain_directory / "volumes" / f"{attachment['volume_id']}.raw").read_bytes()
    assert len(braked.admin.events("attachment.detached", attachment["id"])) == 1
    two = initiator_of(braked.admin.attach(attachment["volume_id"], TWO))
    assert "(515)" in (one.login_error() or "")
    two.io(f"read -P {after[0]} 0 4096")


def test_an_attach_ends_once_when_the_target_was_asked_already(braked: RunningService) -> None:
    """tgtd is stopped while the worker asks it: whether it did what it was asked, nobody knows."""
    volume = written(braked)
    tgtd, worker = braked.tgtd_pid(), braked.worker_pid()
    braked.kill(tgtd, signal.SIGSTOP)
    try:
        wish = {"instance_id": "test", "node": "test", "initiator": TWO}
        operation = braked.admin.start_operation(f"/v1/volumes/{volume}/attachments", **wish)
        wait_until(lambda: braked.admin.show(f"/v1/operations/{operation}")["state"] == "running", 60, "the act")
        braked.kill(worker)
    finally:
        braked.kill(tgtd, signal.SIGCONT)
    ended = braked.admin.wait_operation(operation)
    assert ended["state"] == "succeeded"
    attachment = braked.admin.show(f"/v1/attachments/{ended['resource']['id']}")
    connection = braked.admin.show(f"/v1/attachments/{attachment['id']}/connection")
    two = initiator_of(attachment | {"connection": connection})
    two.read(0, MIB, 0x5A)
    assert len(braked.admin.events("attachment.attached", attachment["id"])) == 1
