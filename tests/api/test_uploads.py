"""Uploads: piece after piece, resumed where they broke off, and what becomes of them."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from blockdev.command import run
from tests.api.support import MIB, NOWHERE, problem, query, unchanged
from tests.support.contents import OCTETS, Raw, announce, uploading
from tests.support.filesystems import after_power_cut, mounted
from tests.support.service import Api, RunningService, running, wait_until

DATA = random.Random(1).randbytes(MIB)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One that looks after uploads often."""
    environment = {"STRATUS_WORKER__POOL_INTERVAL": "0.5"}
    with running(tmp_path_factory.mktemp("uploads") / "home", environment) as started:
        yield started


@pytest.fixture(scope="module")
def admin(service: RunningService) -> Api:
    return service.admin


def send(api: Api, image: str, data: bytes, first: int, total: int) -> requests.Response:
    return api.put(f"/v1/images/{image}/upload", data=data, headers=uploading(first, len(data), total))


def upload(api: Api, data: bytes, pieces: int = 3, **told: Any) -> tuple[str, dict[str, Any]]:
    """The image's id, and the operation of its last piece when that has ended."""
    image = announce(api, data, **told)
    size = -(-len(data) // pieces)
    for first in range(0, len(data), size):
        answer = send(api, image, data[first : first + size], first, len(data))
        last = first + size >= len(data)
        assert answer.status_code == (202 if last else 200), answer.text
    assert answer.headers["Location"] == f"/v1/operations/{answer.json()['id']}"
    return image, api.wait_operation(answer.json()["id"])


def part(service: RunningService, image: str) -> Path:
    return service.home / "uploads" / f"{image}.part"


def received(api: Api, image: str) -> int:
    return int(api.show(f"/v1/images/{image}/upload")["received"])


# ---------------------------------------------------------------- what becomes of them


def test_what_was_sent_becomes_an_image_and_can_be_read(service: RunningService) -> None:
    owner = service.user("owner")
    image, operation = upload(owner, DATA)
    assert (operation["kind"], operation["state"], operation["error"]) == ("image.commit", "succeeded", None)
    shown = owner.show(f"/v1/images/{image}")
    assert (shown["state"], shown["size"], shown["source_format"]) == ("available", MIB, "raw")
    assert shown["source_digests"]["sha256"] == hashlib.sha256(DATA).hexdigest()
    got = owner.get(f"/v1/images/{image}/content")
    assert hashlib.sha256(got.content).hexdigest() == shown["digest"]
    _same_disk(service, got.content, DATA)
    wait_until(lambda: not part(service, image).exists(), what="the end of the part")
    assert owner.show("/v1/quotas/owner")["used_size"] == shown["file_size"]
    problem(owner.get(f"/v1/images/{image}/upload"), 409, "image-not-receiving")
    problem(send(owner, image, DATA, 0, MIB), 409, "image-not-receiving")


def _same_disk(service: RunningService, qcow2: bytes, raw: bytes) -> None:
    made, back = service.home.parent / "made.qcow2", service.home.parent / "back.raw"
    made.write_bytes(qcow2)
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(made), str(back)], timeout=60)
    assert back.read_bytes() == raw


def test_a_compressed_one_is_known_by_either_digest(admin: Api) -> None:
    packed = gzip.compress(DATA)
    for checksum in (hashlib.sha256(packed).hexdigest(), "sha512:" + hashlib.sha512(DATA).hexdigest()):
        image, operation = upload(admin, packed, compression="gz", checksum=checksum)
        assert operation["error"] is None
        assert admin.show(f"/v1/images/{image}")["size"] == MIB


@pytest.mark.parametrize(
    ("data", "told", "code"),
    [
        (DATA, {"checksum": hashlib.sha256(b"another").hexdigest()}, "wrong-digest"),
        (DATA, {"format": "qcow2"}, "bad-format"),
        (DATA, {"compression": "xz"}, "bad-compression"),
        (gzip.compress(DATA, mtime=0)[:-9], {"compression": "gz"}, "truncated"),
    ],
    ids=["digest", "format", "compression", "truncated"],
)
def test_what_is_not_what_was_announced_leaves_nothing(
    service: RunningService, data: bytes, told: dict[str, Any], code: str
) -> None:
    name = f"loser-of-{code}-{len(told)}"
    loser = service.user(name)
    image, operation = upload(loser, data, **told)
    assert (operation["state"], operation["error"]["code"]) == ("failed", code)
    problem(loser.get(f"/v1/images/{image}"), 404, "image-not-found")
    wait_until(lambda: not part(service, image).exists(), what="the end of the part")
    quota = loser.show(f"/v1/quotas/{name}")
    assert (quota["used_size"], quota["used_count"]) == (0, 0)


# ---------------------------------------------------------------- pieces


def test_pieces_follow_one_another_and_nothing_else_is_taken(service: RunningService, admin: Api) -> None:
    image = announce(admin, DATA)
    assert admin.show(f"/v1/images/{image}/upload") == {"received": 0, "size": MIB}
    assert send(admin, image, DATA[:1000], 0, MIB).json() == {"received": 1000, "size": MIB}
    for first, size in ((0, 1000), (999, 10), (1001, 10), (MIB - 5, 5)):
        answer = send(admin, image, DATA[first : first + size], first, MIB)
        problem(answer, 409, "upload-out-of-order")
        assert answer.headers["Upload-Offset"] == "1000"
        assert "1000 bytes" in answer.json()["detail"]
    assert received(admin, image) == 1000
    assert send(admin, image, DATA[1000:1001], 1000, MIB).json()["received"] == 1001
    assert part(service, image).read_bytes() == DATA[:1001]
    assert part(service, image).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("headers", "place"),
    [
        ({}, "Content-Range"),
        ({"Content-Range": "bytes 0-9"}, "Content-Range"),
        ({"Content-Range": "bytes 0-9/*"}, "Content-Range"),
        ({"Content-Range": "bytes */1048576"}, "Content-Range"),
        ({"Content-Range": "bytes 9-0/1048576"}, "Content-Range"),
        ({"Content-Range": "bytes 1048570-1048579/1048576"}, "Content-Range"),
        ({"Content-Range": "bytes 0-9/1048577"}, "Content-Range"),
        ({"Content-Range": "bytes 0-8/1048576"}, "Content-Length"),
        ({"Content-Range": "bytes 0-10/1048576"}, "Content-Length"),
        ({"Content-Range": "bytes -1-8/1048576"}, "Content-Range"),
        ({"Content-Range": "bytes 0-99999999999999999999/1048576"}, "Content-Range"),
    ],
)
def test_a_range_that_cannot_be_is_refused(
    service: RunningService, admin: Api, headers: dict[str, str], place: str
) -> None:
    image = announce(admin, DATA)
    with unchanged(service):
        answer = admin.put(f"/v1/images/{image}/upload", data=DATA[:10], headers={"Content-Type": OCTETS} | headers)
        problem(answer, 422, "invalid-request", place)


def test_only_bytes_are_taken_of_a_length_that_is_told(admin: Api) -> None:
    path = f"/v1/images/{announce(admin, DATA)}/upload"
    span = {"Content-Range": f"bytes 0-9/{MIB}"}
    problem(admin.put(path, data=DATA[:10], headers={"Content-Type": "application/json"} | span), 415, "not-bytes")
    problem(admin.put(path, data=DATA[:10], headers=span), 415, "not-bytes")
    chunked = admin.put(path, data=iter([DATA[:10]]), headers={"Content-Type": OCTETS} | span)
    problem(chunked, 411, "length-required")


def test_a_piece_is_64_mib_at_most_and_all_other_bodies_256_kib(service: RunningService, admin: Api) -> None:
    most = 64 << 20
    image = announce(admin, DATA, size=most + 2)
    with closing(Raw(admin, "PUT", f"/v1/images/{image}/upload", uploading(0, most + 1, most + 2))) as sender:
        assert sender.status() == 413
    assert send(admin, image, bytes(most), 0, most + 2).json()["received"] == most
    for method, path in (("POST", "/v1/images"), ("POST", "/v1/volumes"), ("PATCH", f"/v1/images/{image}")):
        large = b'{"name": "' + b"a" * (256 << 10) + b'"}'
        answer = service.admin.request(method, path, data=large, headers={"Content-Type": "application/json"})
        problem(answer, 413, "body-too-large")
    # A body of bytes is no way around the limit elsewhere.
    for method, path in (("POST", "/v1/images"), ("PUT", f"/v1/images/{image}/pins/a")):
        answer = service.admin.request(method, path, data=bytes(1 << 20), headers={"Content-Type": OCTETS})
        assert answer.status_code != 200, answer.text
        assert answer.json()["code"] in ("body-too-large", "not-json", "image-not-available"), answer.text
    again = service.admin  # the connection of a body that was not read is at its end
    assert again.delete(f"/v1/images/{image}").status_code == 204


def test_of_two_at_once_one_is_told_to_wait(service: RunningService, admin: Api) -> None:
    image = announce(admin, DATA)
    path = f"/v1/images/{image}/upload"
    with closing(Raw(admin, "PUT", path, uploading(0, 1000, MIB))) as first:
        first.send(DATA[:500])
        wait_until(part(service, image).exists, what="the first")
        wait_until(lambda: send(admin, image, DATA[:10], 0, MIB).status_code == 409, what="the lock")
        answer = send(admin, image, DATA[:1000], 0, MIB)
        problem(answer, 409, "upload-busy")
        assert answer.headers["Retry-After"] == "1"
        first.send(DATA[500:1000])
        assert first.status() == 200
    assert received(admin, image) == 1000
    assert part(service, image).read_bytes() == DATA[:1000]


# ---------------------------------------------------------------- who


def test_only_the_owner_sends_and_looks(service: RunningService) -> None:
    owner, stranger = service.user("sender"), service.user("onlooker")
    node = service.node("upload-node", "iqn.2026-11.org.example:upload")
    private = announce(owner, DATA)
    for image in (private, NOWHERE):
        problem(send(stranger, image, DATA[:10], 0, MIB), 404, "image-not-found")
        problem(stranger.get(f"/v1/images/{image}/upload"), 404, "image-not-found")
    problem(send(node, private, DATA[:10], 0, MIB), 403, "not-owner")
    assert owner.patch(f"/v1/images/{private}", json={"visibility": "public"}).status_code == 200
    problem(send(stranger, private, DATA[:10], 0, MIB), 403, "not-owner")
    problem(stranger.get(f"/v1/images/{private}/upload"), 403, "not-owner")
    assert send(service.admin, private, DATA[:10], 0, MIB).status_code == 200
    assert received(owner, private) == 10


def test_what_is_no_upload_has_none(service: RunningService, admin: Api) -> None:
    volume = admin.make_volume(MIB)["id"]
    made = admin.post("/v1/images", json={"volume": volume}, headers={"Prefer": "wait=30"})
    assert made.status_code == 201, made.text
    problem(admin.get(f"/v1/images/{made.json()['id']}/upload"), 409, "image-not-receiving")


# ---------------------------------------------------------------- broken off


def test_what_came_of_a_piece_that_broke_off_is_kept(service: RunningService, admin: Api) -> None:
    image = announce(admin, DATA)
    with closing(Raw(admin, "PUT", f"/v1/images/{image}/upload", uploading(0, MIB, MIB))) as sender:
        sender.send(DATA[: 600 << 10])
    wait_until(lambda: received(admin, image) > 0, what="what had come")
    here = received(admin, image)
    assert here <= 600 << 10
    assert part(service, image).read_bytes()[:here] == DATA[:here]
    answer = send(admin, image, DATA[here:], here, MIB)
    assert answer.status_code == 202
    assert admin.wait_operation(answer.json()["id"])["error"] is None


def test_a_killed_api_process_has_told_of_no_byte_that_is_not_there(service: RunningService, admin: Api) -> None:
    image = announce(admin, DATA)
    send(admin, image, DATA[:1000], 0, MIB)
    with closing(Raw(admin, "PUT", f"/v1/images/{image}/upload", uploading(1000, 700 << 10, MIB))) as sender:
        sender.send(bytes(600 << 10))  # of which nothing shall count
        wait_until(lambda: part(service, image).stat().st_size > 1000, what="bytes of the second piece")
        for pid in service.pids("gunicorn"):
            service.kill(pid, signal.SIGKILL)
        assert sender.ended()
    wait_until(service.is_ready, 60, "the service")
    assert received(admin, image) == 1000
    answer = send(admin, image, DATA[1000:], 1000, MIB)
    assert answer.status_code == 202
    assert admin.wait_operation(answer.json()["id"])["error"] is None  # its digest is that of DATA


def test_what_was_told_to_be_here_is_here_after_a_power_cut(tmp_path: Path) -> None:
    with mounted("xfs", 400 << 20, tmp_path) as point:
        with running(point / "home", {"STRATUS_IMAGES__RESERVE": "0"}) as service:
            image = announce(service.admin, DATA)
            assert send(service.admin, image, DATA[:700_001], 0, MIB).json()["received"] == 700_001
            with after_power_cut(point, tmp_path) as found:
                assert (found / "home" / "uploads" / f"{image}.part").read_bytes()[:700_001] == DATA[:700_001]
                shutil.copytree(found / "home", tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
        told = query(_at(tmp_path / "copy"), "SELECT received FROM images")
        assert [row["received"] for row in told] == [700_001]


def _at(home: Path) -> RunningService:
    """For its database alone: opened once for writing, so that what is in its log is read."""
    run(["sqlite3", str(home / "stratus.db"), "PRAGMA wal_checkpoint"], timeout=60)
    return RunningService(home)


# ---------------------------------------------------------------- the end of uploads


def test_one_that_is_deleted_is_gone_with_its_part(service: RunningService) -> None:
    api = service.user("quitter")
    image = announce(api, DATA)
    send(api, image, DATA[:1000], 0, MIB)
    assert api.delete(f"/v1/images/{image}").status_code == 204
    problem(send(api, image, DATA[:10], 1000, MIB), 404, "image-not-found")
    wait_until(lambda: not part(service, image).exists(), what="the end of the part")
    assert api.show("/v1/quotas/quitter")["used_size"] == 0


def test_one_that_is_abandoned_ends_and_one_that_is_sent_does_not(tmp_path: Path) -> None:
    environment = {"STRATUS_IMAGES__UPLOAD_EXPIRY": "1", "STRATUS_WORKER__POOL_INTERVAL": "0.2"}
    with running(tmp_path / "home", environment) as service:
        api = service.admin
        sent = announce(api, DATA)
        with closing(Raw(api, "PUT", f"/v1/images/{sent}/upload", uploading(0, 1000, MIB))) as sender:
            sender.send(DATA[:500])
            wait_until(part(service, sent).exists, what="the sender")
            abandoned = announce(api, DATA)
            wait_until(lambda: api.get(f"/v1/images/{abandoned}").status_code == 404, what="the end of the abandoned")
            assert api.show(f"/v1/images/{sent}")["state"] == "receiving"
            sender.send(DATA[500:1000])
            assert sender.status() == 200
        wait_until(lambda: api.get(f"/v1/images/{sent}").status_code == 404, what="the end of the other")
        wait_until(lambda: not part(service, sent).exists(), what="the end of its part")
        kinds = [event["kind"] for event in api.events(resource=abandoned)]
        assert kinds == ["image.deleted", "image.upload-expired", "image.create"]


# ---------------------------------------------------------------- room


@pytest.fixture
def cramped(tmp_path: Path) -> Iterator[RunningService]:
    """A service whose home, database included, has little room, a part of which is not for uploads."""
    environment = {"STRATUS_IMAGES__RESERVE": str(64 * MIB), "STRATUS_WORKER__POOL_INTERVAL": "0.5"}
    with mounted("tmpfs", 160 * MIB, tmp_path) as point, running(point / "home", environment) as service:
        yield service


def test_uploads_do_not_fill_the_disk_under_the_database(cramped: RunningService) -> None:
    api, other = cramped.admin, cramped.user("other")
    system = os.statvfs(cramped.home)
    room = system.f_bavail * system.f_frsize - 64 * MIB
    assert room > 24 * MIB
    too_much = {"size": room + 8 * MIB, "checksum": "0" * 64, "format": "raw"}
    problem(api.post("/v1/images", json={"upload": too_much}), 409, "upload-no-room")
    size = room - 8 * MIB
    image = announce(api, b"", size=size)
    # What was announced is kept free for it.
    problem(other.post("/v1/images", json={"upload": {**too_much, "size": 16 * MIB}}), 409, "upload-no-room")
    assert send(api, image, bytes(MIB), 0, size).status_code == 200
    # Somebody else fills the disk: nothing is taken beyond the reserve, and the database goes on.
    filler = cramped.home.parent / "filler"
    filler.write_bytes(bytes(room - 4 * MIB))
    problem(send(api, image, bytes(16 * MIB), MIB, size), 409, "upload-no-room")
    left = os.statvfs(cramped.home)
    assert left.f_bavail * left.f_frsize > 60 * MIB
    assert other.post("/v1/tokens", json={}).status_code == 201
    filler.unlink()
    assert send(api, image, bytes(MIB), received(api, image), size).status_code == 200


def test_a_disk_that_gets_full_in_the_middle_of_a_piece_ends_it(cramped: RunningService) -> None:
    api = cramped.admin
    size = 16 * MIB
    image = announce(api, b"", size=size)
    with closing(Raw(api, "PUT", f"/v1/images/{image}/upload", uploading(0, size, size))) as sender:
        sender.send(bytes(2 * MIB))
        wait_until(
            lambda: part(cramped, image).exists() and part(cramped, image).stat().st_size, what="the first bytes"
        )
        system = os.statvfs(cramped.home)
        (cramped.home.parent / "filler").write_bytes(bytes(system.f_bavail * system.f_frsize - 63 * MIB))
        sender.send(bytes(4 * MIB))
        assert sender.status() == 409
    here = received(api, image)
    assert 0 < here <= 6 * MIB
    assert api.post("/v1/tokens", json={}).status_code == 201
