"""Reading an image: whole and in ranges (RFC 9110), to whom, and what is told of it."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import os
import random
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from gunicorn.config import Config
from gunicorn.http import RequestParser, wsgi
from sqlalchemy import select

from app.config import read_effective
from app.db import Database
from app.factory import create_app
from app.models import Image, ImageAsker, User
from app.transfers import Sending
from tests.api.support import NOWHERE, events, initiator, problem, query
from tests.support.contents import plant
from tests.support.service import Api, RunningService

DATA = random.Random(2).randbytes((300 << 10) + 17)
SIZE = len(DATA)
DIGEST = hashlib.sha256(DATA).hexdigest()
ETAG = f'"{DIGEST}"'
OTHER = f'"{hashlib.sha256(b"").hexdigest()}"'


@pytest.fixture(scope="module")
def image(service: RunningService) -> str:
    return f"/v1/images/{plant(service, DATA)}/content"


@pytest.fixture(scope="module")
def admin(service: RunningService) -> Api:
    return service.admin


# ---------------------------------------------------------------- all of it


def test_all_of_it(admin: Api, image: str) -> None:
    answer = admin.get(image)
    assert answer.status_code == 200
    assert answer.content == DATA
    assert (
        dict(answer.headers).items()
        >= {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(SIZE),
            "Content-Disposition": 'attachment; filename="planted.qcow2"',
            "ETag": ETAG,
            "Accept-Ranges": "bytes",
            "Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(DATA).digest()).decode()}:",
            "Cache-Control": "private, no-cache",
        }.items()
    )
    assert "Content-Range" not in answer.headers
    assert "X-Accel-Redirect" not in answer.headers


def test_its_head_tells_the_same_and_is_no_reading(service: RunningService, admin: Api, image: str) -> None:
    before = events(service, image.split("/")[3])
    answer = admin.head(image, headers={"Range": "bytes=0-1"})
    assert (answer.status_code, answer.content) == (200, b"")
    got = admin.get(image).headers
    differ = {"Date"}
    assert {k: v for k, v in answer.headers.items() if k not in differ} == {
        k: v for k, v in got.items() if k not in differ
    }
    after = events(service, image.split("/")[3])
    assert len(after) == len(before) + 1  # that of the GET


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("debian-12", "debian-12.qcow2"),
        ("debian-12.qcow2", "debian-12.qcow2"),
        ('a "b"; x=/../c', "a-b-x-..-c.qcow2"),
        ("..", None),
        ("Ärger\u202e", "rger.qcow2"),
        (None, None),
    ],
)
def test_the_file_has_a_name_that_harms_nobody(
    service: RunningService, admin: Api, name: str | None, file: str | None
) -> None:
    identifier = plant(service, DATA, name=name)
    told = admin.head(f"/v1/images/{identifier}/content").headers["Content-Disposition"]
    assert told == f'attachment; filename="{file or f"{identifier}.qcow2"}"'


# ---------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=5-9", 5, 9),
        ("bytes=5-", 5, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
        (f"bytes=7-{SIZE + 5}", 7, SIZE - 1),
        ("bytes=7-999999999999999999", 7, SIZE - 1),
        ("bytes=-1", SIZE - 1, SIZE - 1),
        ("bytes=-4096", SIZE - 4096, SIZE - 1),
        ("Bytes=5-9", 5, 9),
        (f"bytes={64 << 10}-{(128 << 10) - 1}", 64 << 10, (128 << 10) - 1),
    ],
)
def test_a_range_is_answered_with_it(admin: Api, image: str, asked: str, first: int, last: int) -> None:
    answer = admin.get(image, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == DATA[first : last + 1]
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["Content-Length"] == str(last + 1 - first)
    assert answer.headers["ETag"] == ETAG


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,5-6", "bytes=9-5", "bytes=a-b", "bytes=-", "bytes", "lines=0-1", "bytes=0-1-2", "bytes=0x1-2", "",
     "bytes=99999999999999999999-", f"bytes=-{SIZE + 5}", f"bytes=-{SIZE}", "bytes=0-", f"bytes=0-{SIZE - 1}"],
)  # fmt: skip
def test_what_is_no_single_range_of_less_is_answered_with_all(admin: Api, image: str, asked: str) -> None:
    answer = admin.get(image, headers={"Range": asked})
    assert answer.status_code == 200
    assert answer.content == DATA
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize(
    "asked", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 9}", "bytes=999999999999999999-", "bytes=-0"]
)
def test_a_range_beyond_the_end_is_416_and_tells_the_size(admin: Api, image: str, asked: str) -> None:
    answer = admin.get(image, headers={"Range": asked})
    problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    ("known", "status"),
    [(ETAG, 206), (OTHER, 200), (f"W/{ETAG}", 200), (DIGEST, 200), ("Sun, 29 Nov 2026 00:00:00 GMT", 200)],
)
def test_what_changed_meanwhile_is_sent_whole(admin: Api, image: str, known: str, status: int) -> None:
    answer = admin.get(image, headers={"Range": "bytes=5-9", "If-Range": known})
    assert answer.status_code == status
    assert answer.content == (DATA[5:10] if status == 206 else DATA)


# ---------------------------------------------------------------- conditions


@pytest.mark.parametrize("known", [ETAG, f"W/{ETAG}", f"{OTHER}, {ETAG}", "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_who_has_it_is_not_sent_it(admin: Api, image: str, method: str, known: str) -> None:
    answer = admin.request(method, image, headers={"If-None-Match": known, "Range": "bytes=0-1"})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["ETag"] == ETAG


def test_who_has_another_is_sent_it(admin: Api, image: str) -> None:
    assert admin.get(image, headers={"If-None-Match": OTHER}).content == DATA


@pytest.mark.parametrize(
    ("known", "status"),
    [(ETAG, 200), (f"{OTHER}, {ETAG}", 200), ("*", 200), (OTHER, 412), (f"W/{ETAG}", 412), ("garbage", 412)],
)
def test_who_wants_another_gets_none(admin: Api, image: str, known: str, status: int) -> None:
    answer = admin.get(image, headers={"If-Match": known})
    assert answer.status_code == status
    if status == 412:
        problem(answer, 412, "precondition-failed")


# ---------------------------------------------------------------- who, and when


def test_it_is_for_those_who_see_it(service: RunningService) -> None:
    owner, stranger, asker = (service.user(name) for name in ("owner", "stranger", "asker"))
    node = service.node("reader", initiator("reader"))
    private, public = (plant(service, DATA, "owner", visibility=v) for v in ("private", "public"))
    _ask(service, "asker", private)
    for api, sees in ((owner, True), (asker, True), (node, True), (service.admin, True), (stranger, False)):
        assert api.get(f"/v1/images/{public}/content").status_code == 200
        answer = api.get(f"/v1/images/{private}/content")
        assert (answer.status_code == 200) is sees
    hidden, missing = (stranger.get(f"/v1/images/{which}/content") for which in (private, NOWHERE))
    problem(hidden, 404, "image-not-found")
    assert hidden.json()["detail"].replace(str(private), NOWHERE) == missing.json()["detail"]
    problem(Api(service.base, None).get(f"/v1/images/{public}/content"), 401, "not-signed-in")


def _ask(service: RunningService, name: str, image_id: UUID) -> None:
    with closing(Database(f"sqlite:///{service.home}/stratus.db")) as database, database.write() as session:
        user_id = session.scalars(select(User.id).where(User.name == name)).one()
        session.add(ImageAsker(image_id=image_id, user_id=user_id))


@pytest.mark.parametrize("state", ["receiving", "fetching", "deleting", "error"])
def test_one_that_is_not_there_yet_or_no_more_is_409(service: RunningService, admin: Api, state: str) -> None:
    identifier = plant(service, DATA, state=state)
    problem(admin.get(f"/v1/images/{identifier}/content"), 409, "image-not-available")


def test_one_whose_file_is_gone_or_cut_is_404(service: RunningService, admin: Api) -> None:
    data = os.urandom(4096)
    url = f"/v1/images/{plant(service, data)}/content"
    assert admin.get(url).content == data
    path = service.home / "images" / "images" / f"{hashlib.sha256(data).hexdigest()}.qcow2"
    os.truncate(path, 4095)
    problem(admin.get(url), 404, "image-not-cached")
    path.unlink()
    problem(admin.get(url), 404, "image-not-cached")


def test_a_link_in_its_place_is_not_followed(service: RunningService, admin: Api) -> None:
    data = os.urandom(4096)
    identifier = plant(service, data)
    path = service.home / "images" / "images" / f"{hashlib.sha256(data).hexdigest()}.qcow2"
    secret = service.home / "secret"
    secret.write_bytes(os.urandom(4096))
    path.unlink()
    path.symlink_to(secret)
    problem(admin.get(f"/v1/images/{identifier}/content"), 404, "image-not-cached")


def test_reading_is_an_event_and_counts_as_use_once_a_minute(service: RunningService) -> None:
    reader = service.user("careful")
    long_ago = "2020-01-01 00:00:00.000000"
    identifier = plant(service, DATA, visibility="public")
    _used(service, identifier, long_ago)
    assert reader.get(f"/v1/images/{identifier}/content").status_code == 200
    used = _used_at(service, identifier)
    assert used > long_ago
    assert reader.get(f"/v1/images/{identifier}/content", headers={"Range": "bytes=5-9"}).status_code == 206
    assert reader.get(f"/v1/images/{identifier}/content", headers={"If-None-Match": "*"}).status_code == 304
    assert _used_at(service, identifier) == used
    told = [(event["kind"], event["actor"], event["detail"]) for event in events(service, str(identifier))]
    assert told == [
        ("image.read", "careful", f'{{"first": 0, "last": {SIZE - 1}}}'),
        ("image.read", "careful", '{"first": 5, "last": 9}'),
    ]


def _used(service: RunningService, identifier: UUID, moment: str) -> None:
    with closing(Database(f"sqlite:///{service.home}/stratus.db")) as database, database.write() as session:
        session.get_one(Image, identifier).used_at = dt.datetime.fromisoformat(moment).replace(tzinfo=dt.UTC)


def _used_at(service: RunningService, identifier: UUID) -> str:
    return str(query(service, "SELECT used_at FROM images WHERE id = ?", identifier.hex)[0]["used_at"])


# ---------------------------------------------------------------- how it is sent


@pytest.fixture
def application(service: RunningService) -> Any:
    """The application itself, on the service's home, to be served by hand."""
    return create_app(read_effective(service.home / "run" / "effective.json"))


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    right.settimeout(30)
    with left, right:
        yield left, right


def test_the_server_sends_it_without_reading_it(
    application: Any, admin: Api, image: str, wire: tuple[socket.socket, socket.socket]
) -> None:
    """Gunicorn's own code with a real connection: what has been sent was not read, so it was sendfile(2)."""
    left, right = wire
    lines = (
        f"GET {image} HTTP/1.1\r\nAuthorization: {admin.headers['Authorization']!s}\r\nRange: bytes=1000-5999\r\n\r\n"
    )
    right.sendall(lines.encode())
    request = next(RequestParser(Config(), left, ("127.0.0.1", 1)))
    response, environ = wsgi.create(request, left, ("127.0.0.1", 1), ("127.0.0.1", 80), Config())
    body = application(environ, response.start_response)
    assert isinstance(body, environ["wsgi.file_wrapper"])
    sending = body.filelike
    assert isinstance(sending, Sending)
    response.write_file(body)
    assert sending._left == 5000
    body.close()
    left.close()
    received = b""
    while data := right.recv(1 << 16):
        received += data
    assert received.partition(b"\r\n\r\n")[2] == DATA[1000:6000]


def test_it_can_be_read_to_the_end_after_it_was_evicted(service: RunningService, admin: Api, tmp_path: Path) -> None:
    data = os.urandom(24 << 20)  # more than the buffers between us and the service hold
    identifier = plant(service, data)
    with admin.get(f"/v1/images/{identifier}/content", stream=True) as answer:
        first = answer.raw.read(1000)
        (service.home / "images" / "images" / f"{hashlib.sha256(data).hexdigest()}.qcow2").unlink()
        rest = answer.raw.read()
    assert first + rest == data
