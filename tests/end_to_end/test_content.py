"""Images handed out to many, to the slow, by nginx and over TLS."""

from __future__ import annotations

import hashlib
import random
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.api.support import problem
from tests.end_to_end.conftest import ONE_PROCESS, Serve
from tests.end_to_end.test_serving import make_certificate
from tests.support.contents import OCTETS, Raw, announce, plant, uploading
from tests.support.proxy import nginx
from tests.support.service import Api, RunningService, running, wait_until

#: More than the buffers between a client and the service hold.
DATA = random.Random(3).randbytes(24 << 20)
ETAG = f'"{hashlib.sha256(DATA).hexdigest()}"'
#: Of one process with 16 threads; half of them to one user.
DOWNLOADS, UPLOADS = 4, 2
CROWD = 40


# ---------------------------------------------------------------- the slow


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One process, which would wait ten minutes for a client that stands still."""
    environment = ONE_PROCESS | {"STRATUS_SERVER__IDLE": "600"}
    with running(tmp_path_factory.mktemp("patient") / "home", environment) as service:
        yield service


def answered(api: Api, times: int = 20) -> None:
    """Everything else goes on."""
    for _ in range(times):
        assert api.get("/v1/whoami", timeout=20).status_code == 200
    made = api.post("/v1/volumes", json={"size": 1 << 20}, timeout=20)
    assert made.status_code == 201


def test_readers_that_do_not_read_take_the_api_from_nobody(patient: RunningService) -> None:
    path = f"/v1/images/{plant(patient, DATA, visibility='public')}/content"
    crowd = [patient.user(f"reader-{number}") for number in range(5)]
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(Raw(crowd[n % 5], "GET", path))) for n in range(CROWD)]
        assert Counter(reader.status() for reader in readers) == {200: DOWNLOADS, 503: CROWD - DOWNLOADS}
        answered(patient.admin)
        refused = patient.admin.get(path)
        problem(refused, 503, "transfers-busy")
        assert refused.headers["Retry-After"].isdigit()
        for which in ({"Range": "bytes=0-0"}, {"If-None-Match": "*"}):
            assert patient.admin.get(path, headers=which).status_code == (304 if "If-None-Match" in which else 503)
    wait_until(lambda: patient.admin.get(path).status_code == 200, what="a place")


def test_nobody_has_more_than_half_of_the_places(patient: RunningService) -> None:
    path = f"/v1/images/{plant(patient, DATA, visibility='public')}/content"
    greedy, other = patient.user("greedy"), patient.user("other")
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(Raw(greedy, "GET", path))) for _ in range(CROWD)]
        assert Counter(reader.status() for reader in readers) == {200: DOWNLOADS // 2, 503: CROWD - DOWNLOADS // 2}
        assert other.get(path).content == DATA


def test_senders_that_do_not_send_take_the_api_from_nobody(patient: RunningService) -> None:
    crowd = [patient.user(f"sender-{number}") for number in range(5)]
    paths = [f"/v1/images/{announce(api, DATA)}/upload" for api in crowd]
    head = uploading(0, 1000, len(DATA))
    with ExitStack() as stack:
        senders = [stack.enter_context(closing(Raw(crowd[n % 5], "PUT", paths[n % 5], head))) for n in range(CROWD)]
        for sender in senders:
            sender.send(b"abc")
        busy = patient.user("late")
        path = f"/v1/images/{announce(busy, DATA)}/upload"
        wait_until(lambda: send(busy, path) == 503, what="an end of the places")
        answered(patient.admin)
        statuses = Counter(sender.status() for sender in senders[UPLOADS:])
        assert statuses.keys() <= {503, 0}
    wait_until(lambda: send(busy, path) == 200, what="a place")


def send(api: Api, path: str) -> int:
    """The status of a first piece."""
    return api.put(path, data=DATA[:1000], headers=uploading(0, 1000, len(DATA))).status_code


def test_who_stands_still_is_cut_off(serve: Serve) -> None:
    service = serve(STRATUS_SERVER__IDLE="1")
    path = f"/v1/images/{plant(service, DATA)}/content"
    with closing(Raw(service.admin, "GET", path)) as reader, closing(Raw(service.admin, "GET", path)) as other:
        assert (reader.status(), other.status()) == (200, 200)
        assert service.admin.get(path).status_code == 503
        wait_until(lambda: service.admin.get(path).status_code == 200, what="a place")
        assert reader.ended()
    upload = f"/v1/images/{announce(service.admin, DATA)}/upload"
    with closing(Raw(service.admin, "PUT", upload, uploading(0, 1 << 20, len(DATA)))) as sender:
        sender.send(DATA[: 600 << 10])
        assert sender.status() == 408
        assert sender.ended()
    stalled = {"Content-Type": "application/json", "Content-Length": "100"}
    with ExitStack() as stack:
        for sender in [
            stack.enter_context(closing(Raw(service.admin, "POST", "/v1/volumes", stalled))) for _ in range(CROWD)
        ]:
            assert sender.status() == 400
            assert sender.ended()
    received = service.admin.show(upload)["received"]
    assert 0 < received <= 600 << 10
    rest = service.admin.put(
        upload, data=DATA[received : 1 << 20], headers=uploading(received, (1 << 20) - received, len(DATA))
    )
    assert rest.json() == {"received": 1 << 20, "size": len(DATA)}


# ---------------------------------------------------------------- broken connections


def test_a_download_is_resumed_where_it_broke_off(service: RunningService) -> None:
    path = f"/v1/images/{plant(service, DATA)}/content"
    got = b""
    breaks = 0
    while len(got) < len(DATA):
        with service.admin.get(path, headers={"Range": f"bytes={len(got)}-", "If-Range": ETAG}, stream=True) as answer:
            assert answer.status_code == (206 if got else 200)
            got += answer.raw.read(9 << 20)  # then the connection is closed, whatever is on its way
        breaks += 1
    assert got == DATA
    assert breaks == 3


# ---------------------------------------------------------------- TLS


def test_over_tls_it_is_read_and_no_byte_too_many(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    arguments = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with running(tmp_path / "home", ONE_PROCESS, arguments, certificate) as service:
        path = f"/v1/images/{plant(service, DATA)}/content"
        assert service.admin.get(path).content == DATA
        answer = service.admin.get(path, headers={"Range": f"bytes=5-{9 << 20}"})
        assert (answer.status_code, answer.content) == (206, DATA[5 : (9 << 20) + 1])
        upload = f"/v1/images/{announce(service.admin, DATA)}/upload"
        sent = service.admin.put(upload, data=DATA[:1000], headers=uploading(0, 1000, len(DATA)))
        assert sent.json() == {"received": 1000, "size": len(DATA)}


# ---------------------------------------------------------------- nginx


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningService, Api]]:
    """A service that hands images out by the nginx in front of it, and the admin as a client of that."""
    folder = tmp_path_factory.mktemp("fronted")
    environment = ONE_PROCESS | {"STRATUS_IMAGES__ACCEL_PREFIX": "/cache/", "STRATUS_SERVER__BEHIND_PROXY": "true"}
    with running(folder / "home", environment) as service, nginx(service, folder) as base:
        yield service, Api(base, service.admin_token)


def test_nginx_hands_it_out(fronted: tuple[RunningService, Api]) -> None:
    service, admin = fronted
    path = f"/v1/images/{plant(service, DATA)}/content"
    answer = admin.get(path)
    assert answer.content == DATA
    told = {name: answer.headers[name] for name in ("ETag", "Accept-Ranges", "Content-Type", "Content-Disposition")}
    assert told == {
        "ETag": ETAG,
        "Accept-Ranges": "bytes",
        "Content-Type": OCTETS,
        "Content-Disposition": 'attachment; filename="planted.qcow2"',
    }
    direct = service.admin.get(path)  # what the service itself says: nothing but where it lies
    assert direct.content == b""
    assert direct.headers["X-Accel-Redirect"].startswith("/cache/")
    assert answer.headers["Repr-Digest"] == direct.headers["Repr-Digest"]
    assert "X-Accel-Redirect" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "status", "content"),
    [
        ({"Range": "bytes=5-9"}, 206, DATA[5:10]),
        ({"Range": "bytes=-3"}, 206, DATA[-3:]),
        ({"Range": "bytes=0-1,5-6"}, 200, DATA),
        ({"Range": "bytes=5-9", "If-Range": ETAG}, 206, DATA[5:10]),
        ({"Range": "bytes=5-9", "If-Range": '"other"'}, 200, DATA),
        ({"If-None-Match": ETAG}, 304, b""),
        ({"If-Match": ETAG}, 200, DATA),
        ({"If-Match": ETAG, "Range": "bytes=5-9"}, 206, DATA[5:10]),
    ],
    ids=["range", "suffix", "two", "if-range", "if-range-other", "if-none-match", "if-match", "if-match-range"],
)
def test_nginx_heeds_ranges_and_conditions(
    fronted: tuple[RunningService, Api], headers: dict[str, str], status: int, content: bytes
) -> None:
    service, admin = fronted
    answer = admin.get(f"/v1/images/{plant(service, DATA)}/content", headers=headers)
    assert (answer.status_code, answer.content == content) == (status, True)
    assert answer.headers["ETag"] == ETAG


def test_nginx_refuses_what_the_service_refuses(fronted: tuple[RunningService, Api]) -> None:
    service, admin = fronted
    path = f"/v1/images/{plant(service, DATA)}/content"
    problem(Api(admin.base, None).get(path), 401, "not-signed-in")
    stranger = Api(admin.base, str(service.user("stranger").headers["Authorization"]).removeprefix("Bearer "))
    problem(stranger.get(path), 404, "image-not-found")
    problem(admin.get(path, headers={"If-Match": '"other"'}), 412, "precondition-failed")
    assert admin.get(path, headers={"Range": f"bytes={len(DATA)}-"}).status_code == 416
    head = admin.head(path)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(DATA)))


def test_nobody_asks_nginx_for_the_file_itself(fronted: tuple[RunningService, Api]) -> None:
    service, admin = fronted
    plant(service, DATA)
    name = f"{hashlib.sha256(DATA).hexdigest()}.qcow2"
    assert (service.home / "images" / "images" / name).exists()
    for path in (f"/cache/{name}", f"/cache//{name}", f"/%63ache/{name}", f"/x/../cache/{name}", f"//cache/{name}"):
        answer = _literally(admin, path)
        assert answer[:12] in (b"HTTP/1.1 404", b"HTTP/1.1 401"), path
        assert DATA[:64] not in answer


def _literally(api: Api, path: str) -> bytes:
    """The answer to exactly this path, which requests would tidy up."""
    host, port = api.base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        signed = f"Authorization: {api.headers['Authorization']!s}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{signed}\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
    return answer


def test_slow_readers_are_nginx_s_and_take_no_place(fronted: tuple[RunningService, Api]) -> None:
    service, admin = fronted
    path = f"/v1/images/{plant(service, DATA)}/content"
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(Raw(admin, "GET", path))) for _ in range(CROWD)]
        assert Counter(reader.status() for reader in readers) == {200: CROWD}
        answered(admin)


def test_an_upload_comes_through_nginx(fronted: tuple[RunningService, Api]) -> None:
    _, admin = fronted
    path = f"/v1/images/{announce(admin, DATA)}/upload"
    sent = admin.put(path, data=DATA[: 20 << 20], headers=uploading(0, 20 << 20, len(DATA)))
    assert sent.json() == {"received": 20 << 20, "size": len(DATA)}
