"""The worker dies in the middle of what it does to a pool: its successor ends it, once, and nothing is left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.interruptions import (
    MIB,
    OF_ANYTHING,
    OF_THE_WORKER,
    ONE,
    SIZE,
    TWO,
    Death,
    PutOn,
    done_once,
    interrupted,
    used,
)
from tests.support.service import RunningService, initiator_of


def written(service: RunningService) -> str:
    """A detached volume with a MiB of 0x5a at its start."""
    attachment, one = service.attached(ONE, SIZE)
    one.write(0, 0x5A, MIB)
    service.admin.detach(attachment["id"])
    return str(attachment["volume_id"])


def snapshot_of(service: RunningService, volume: str) -> str:
    answer = service.admin.post(f"/v1/volumes/{volume}/snapshots", json={})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def read_back(service: RunningService, volume: str) -> None:
    """What `written` wrote is there, and nothing else."""
    attachment = service.admin.attach(volume, TWO)
    initiator = initiator_of(attachment)
    initiator.read(0, MIB, 0x5A)
    initiator.read(MIB, SIZE - MIB, 0)
    service.admin.detach(attachment["id"])


@OF_THE_WORKER
def test_a_create_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, death: Death) -> None:
    size, count = used(braked)
    with interrupted(braked, brake("sync"), death):
        operation = braked.admin.start_operation("/v1/volumes", size=SIZE)
    volume = done_once(braked, operation, "volume.created", plain_directory)
    assert used(braked) == (size + SIZE, count + 1)
    assert (plain_directory / "volumes" / f"{volume}.raw").stat().st_size == SIZE
    assert braked.admin.show(f"/v1/volumes/{volume}")["state"] == "available"


@OF_THE_WORKER
def test_a_snapshot_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, death: Death) -> None:
    volume = written(braked)
    size, count = used(braked)
    with interrupted(braked, brake("copy"), death):
        operation = braked.admin.start_operation(f"/v1/volumes/{volume}/snapshots", name="held")
    snapshot = done_once(braked, operation, "snapshot.created", plain_directory)
    assert used(braked) == (size + SIZE, count + 1)
    read_back(braked, braked.admin.make_volume(SIZE, snapshot=snapshot)["id"])
    read_back(braked, volume)


@OF_ANYTHING
def test_a_clone_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, death: Death) -> None:
    source = written(braked)
    size, count = used(braked)
    with interrupted(braked, brake("copy"), death):
        operation = braked.admin.start_operation("/v1/volumes", volume=source)
    clone = done_once(braked, operation, "volume.created", plain_directory)
    assert used(braked) == (size + SIZE, count + 1)
    read_back(braked, clone)
    read_back(braked, source)  # nobody is counted as copying it any more


@OF_THE_WORKER
def test_a_revert_ends_once(braked: RunningService, brake: PutOn, plain_directory: Path, death: Death) -> None:
    volume = written(braked)
    snapshot, before = snapshot_of(braked, volume), used(braked)
    attachment = braked.admin.attach(volume, ONE)
    initiator_of(attachment).write(0, 0x11, 2 * MIB)
    braked.admin.detach(attachment["id"])
    with interrupted(braked, brake("copy"), death):
        operation = braked.admin.start_operation(f"/v1/volumes/{volume}/revert", snapshot=snapshot)
    done_once(braked, operation, "volume.reverted", plain_directory)
    assert used(braked) == before
    read_back(braked, volume)


@OF_THE_WORKER
@pytest.mark.parametrize("kind", ["volume", "snapshot"])
def test_a_delete_ends_once(
    braked: RunningService, brake: PutOn, plain_directory: Path, kind: str, death: Death
) -> None:
    volume = written(braked)
    snapshot = snapshot_of(braked, volume)
    gone = {"volume": volume, "snapshot": snapshot}[kind]
    size, count = used(braked)
    with interrupted(braked, brake("unlink"), death):
        operation = braked.admin.start_operation(f"/v1/{kind}s/{gone}", "DELETE")
    done_once(braked, operation, f"{kind}.deleted", plain_directory)
    assert used(braked) == (size - SIZE, count - 1)
    assert braked.admin.get(f"/v1/{kind}s/{gone}").status_code == 404
    assert list(plain_directory.glob(f"*/{gone}*")) == []
    left = volume if kind == "snapshot" else str(braked.admin.make_volume(SIZE, snapshot=snapshot)["id"])
    read_back(braked, left)
