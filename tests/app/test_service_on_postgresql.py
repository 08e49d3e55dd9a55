"""The whole service on PostgreSQL: the main job, a restart, and the database going away for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.initiator import Initiator
from tests.support.postgres import Postgres
from tests.support.service import RunningService, running, wait_until

IQN = "iqn.2026-11.org.example:postgres"


@pytest.fixture
def service(postgres: Postgres, tmp_path: Path) -> Iterator[RunningService]:
    name = postgres.create()  # empty: the service migrates it
    try:
        with running(tmp_path / "home", {"STRATUS_DATABASE__URL": postgres.url(name)}) as started:
            yield started
    finally:
        postgres.drop(name)


def initiator(answer: dict[str, object]) -> Initiator:
    connection = answer["connection"]
    assert isinstance(connection, dict)
    auth = connection["auth"]
    return Initiator(
        connection["portal"], connection["target"], IQN, auth["username"], auth["password"], lun=connection["lun"]
    )


def test_a_volume_lives_through_detach_and_restart(service: RunningService, postgres: Postgres) -> None:
    api = service.user("alice")
    volume = api.make_volume(64 << 20, name="data")["id"]
    first = api.attach(volume, IQN)
    initiator(first).write(4096, 0x5A, 8192)
    refused = api.post(
        f"/v1/volumes/{volume}/attachments", json={"instance_id": "i", "node": "n", "initiator": IQN + "2"}
    )
    assert (refused.status_code, refused.json()["code"]) == (409, "volume-in-use")
    api.detach(first["id"])
    assert initiator(first).login_error() is not None

    second = api.attach(volume, IQN)
    service.restart()
    initiator(second).read(4096, 8192, 0x5A)
    grown = api.patch(f"/v1/volumes/{volume}", json={"size": 96 << 20})
    assert (grown.status_code, grown.json()["size"]) == (200, 96 << 20)
    assert initiator(second).size() == 96 << 20
    api.detach(second["id"])
    assert api.delete(f"/v1/volumes/{volume}").status_code == 204
    assert not (service.home / "stratus.db").exists()
    service.stop()
    told = service.command("stratus-storage", "verify-events").stdout
    assert "0 not sealed yet" in told
    assert service.pids() == []


def test_losing_all_connections_is_survived(service: RunningService, postgres: Postgres) -> None:
    api = service.user("alice")
    api.make_volume(1 << 20)
    postgres.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname LIKE 'test%'"
    )
    wait_until(service.is_ready, 60, "the service")
    volume = wait_until(lambda: _made(api), 60, "a volume")
    assert api.delete(f"/v1/volumes/{volume}").status_code == 204


def _made(api: object) -> str | None:
    answer = api.post("/v1/volumes", json={"size": 1 << 20})  # type: ignore[attr-defined]
    assert answer.status_code in (201, 503), answer.text
    return answer.json()["id"] if answer.status_code == 201 else None
