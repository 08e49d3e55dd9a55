"""Images through a whole service: one download for all who ask, faults of the origin, deaths of the worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from app.db import Database
from tests.end_to_end.conftest import Serve
from tests.support import invariants
from tests.support.filesystems import mounted
from tests.support.imagehouse import MIB, content, sha256
from tests.support.origin import Origin
from tests.support.service import RunningService, wait_until

LOOPBACK = {"STRATUS_IMAGES__ALLOW_NETWORKS": '["127.0.0.0/8"]'}
#: Looks at what is there to be done, and acts, often.
BRISK = {"STRATUS_WORKER__POOL_INTERVAL": "0.5", "STRATUS_WORKER__RECONCILE_INTERVAL": "1"}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as started:
        yield started


def publish(origin: Origin, data: bytes, path: str = "/a.raw", **faults: Any) -> dict[str, str]:
    origin.put(path, data, **faults)
    return {"reference": origin.url(path), "checksum": sha256(data)}


def downloads(origin: Origin, path: str = "/a.raw") -> list[dict[str, str]]:
    """A look at the beginning is none."""
    return [headers for headers in origin.asked(path) if headers.get("Range") != "bytes=0-511"]


def at_rest(service: RunningService) -> None:
    """Nothing is half-way, neither in the database nor in the cache."""
    with closing(Database(f"sqlite:///{service.home}/stratus.db")) as database:
        invariants.check(database, idle=True)
    assert list((service.home / "images" / "staging").iterdir()) == []
    named = {image["digest"] for image in service.admin.show("/v1/images")["items"]}
    assert {path.stem for path in (service.home / "images" / "images").iterdir()} == named


def test_fifty_who_ask_at_once_share_one_download(serve: Serve, origin: Origin) -> None:
    """Through four processes of the API, for an image that is not there yet."""
    service = serve(**LOOPBACK, STRATUS_SERVER__PROCESSES="4")
    data = content(1, 16 * MIB)
    asked = publish(origin, data, pause=0.002)
    barrier = threading.Barrier(50)

    def one(_: int) -> tuple[int, Any]:
        with closing(service.admin) as api:
            barrier.wait()
            answer = api.post("/v1/images", json=asked, headers={"Prefer": "wait=30"})
            if answer.status_code == 202:
                ended = api.wait_operation(answer.json()["id"])
                assert ended["state"] == "succeeded", ended
                return 201, ended["resource"]["id"]
            return answer.status_code, answer.json().get("id")

    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(one, range(50)))
    assert {status for status, _ in found} == {201}
    assert len({identifier for _, identifier in found}) == 1
    assert len(downloads(origin)) == 1
    at_rest(service)


def test_an_origin_that_dies_and_returns_is_resumed(serve: Serve, origin: Origin) -> None:
    service = serve(**LOOPBACK)
    data = content(1, 20 * MIB)  # the first answer is to the look at its beginning
    answer = service.admin.post("/v1/images", json=publish(origin, data, breaks=[len(data), 12 * MIB]))
    ended = answer.json() if answer.status_code == 201 else service.admin.wait_operation(answer.json()["id"])
    assert ended["state"] in ("available", "succeeded"), ended
    first, second = downloads(origin)
    assert "Range" not in first
    assert second["Range"] == f"bytes={12 * MIB}-"
    # What had come was not sent again. The look is of 512 bytes, but the server has sent what its socket holds by then.
    assert origin.served("/a.raw") < len(data) + 8 * MIB
    at_rest(service)


def test_an_origin_that_is_gone_is_told_and_leaves_nothing(serve: Serve, origin: Origin) -> None:
    service = serve(**LOOPBACK)
    answer = service.admin.post("/v1/images", json=publish(origin, content(1), statuses=[404] * 99))
    assert (answer.status_code, answer.json()["code"]) == (503, "unreachable")
    assert "127.0.0.1" in answer.json()["detail"]
    assert service.admin.show("/v1/images")["items"] == []
    (operation,) = service.admin.show("/v1/operations")["items"]
    assert (operation["state"], operation["error"]["code"]) == ("failed", "unreachable")
    at_rest(service)


def test_a_worker_that_is_killed_while_it_fetches_is_followed_by_one_that_ends_it(serve: Serve, origin: Origin) -> None:
    service = serve(**LOOPBACK, **BRISK)
    data = content(1, 16 * MIB)
    asked = publish(origin, data, pause=0.01)
    operation = service.admin.start_operation("/v1/images", **asked)
    for _ in range(2):
        before = origin.served("/a.raw")
        wait_until(lambda before=before: origin.served("/a.raw") > before + 2 * MIB, 60, "some bytes")
        killed = service.worker_pid()
        service.kill(killed)
        wait_until(lambda killed=killed: service.worker_pid() != killed, 60, "another worker")
    ended = service.admin.wait_operation(operation)
    assert ended["state"] == "succeeded", ended
    assert service.admin.show(f"/v1/images/{ended['resource']['id']}")["state"] == "available"
    at_rest(service)


def test_a_full_disk_of_the_cache_is_told_and_harms_nobody(serve: Serve, origin: Origin, tmp_path: Path) -> None:
    with mounted("tmpfs", 24 * MIB, tmp_path) as point:
        service = serve(**LOOPBACK, STRATUS_IMAGES__PATH=str(point), STRATUS_IMAGES__RESERVE="1MiB", **BRISK)
        answer = service.admin.post("/v1/images", json=publish(origin, content(1, 64 * MIB)))
        told = (
            answer.json() if answer.status_code != 202 else service.admin.wait_operation(answer.json()["id"])["error"]
        )
        assert told["code"] == "image-cache-full"
        assert service.admin.make_volume(MIB)["state"] == "available"
        small = service.admin.post("/v1/images", json=publish(origin, content(2), "/b.raw"))
        assert small.status_code == 201, small.text
        assert [path.stem for path in (point / "images").iterdir()] == [small.json()["digest"]]
        service.stop()


def test_a_rotten_image_is_found_and_fetched_again(serve: Serve, origin: Origin) -> None:
    service = serve(**LOOPBACK, **BRISK, STRATUS_IMAGES__SCRUB_INTERVAL="1")
    made = service.admin.post("/v1/images", json=publish(origin, content(1))).json()
    path = service.home / "images" / "images" / f"{made['digest']}.qcow2"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"rot")
    wait_until(lambda: service.admin.events("image.lost", made["id"]), 60, "the rot")
    wait_until(lambda: service.admin.show(f"/v1/images/{made['id']}")["state"] == "available", 60, "the image")
    assert sha256(path.read_bytes()) == made["digest"]
    assert len(downloads(origin)) == 2


def test_a_volume_begins_with_the_images_bytes_and_takes_no_room(serve: Serve, origin: Origin, tmp_path: Path) -> None:
    with mounted("xfs", 512 * MIB, tmp_path) as point:
        service = serve(**LOOPBACK, STRATUS_POOLS__DEFAULT__PATH=str(point), **BRISK)
        data = content(1, 64 * MIB)
        asked = publish(origin, data)
        body = {"image": asked["reference"], "checksum": asked["checksum"]}
        first = service.admin.post("/v1/volumes", json=body, headers={"Prefer": "wait=30"})
        assert first.status_code == 201, first.text
        free = _free(point)
        volumes = [first.json(), *(service.admin.post("/v1/volumes", json=body).json() for _ in range(4))]
        assert free - _free(point) < 8 * MIB
        for volume in volumes:
            assert volume["size"] == len(data)
            assert (point / "volumes" / f"{volume['id']}.raw").read_bytes() == data
        assert {volume["origin"]["kind"] for volume in volumes} == {"image"}
        image = service.admin.show("/v1/images")["items"][0]
        assert image["pins"] == 5
        answer = service.admin.delete(f"/v1/images/{image['id']}")
        assert (answer.status_code, answer.json()["code"]) == (409, "image-pinned")
        at_rest(service)
        service.stop()


def _free(point: Path) -> int:
    os.sync()
    found = os.statvfs(point)
    return found.f_bfree * found.f_frsize
