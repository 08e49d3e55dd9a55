from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stratus.client import Client
from stratus.config import Config
from stratus.errors import (
    Interrupted,
    OperationFailed,
    Problem,
    StillRunning,
    StratusError,
    TimedOut,
    Unreachable,
    Untrusted,
)
from tests.stratus.standin import (
    OPERATION,
    VOLUME,
    Reply,
    StandIn,
    accepted,
    operation,
    problem,
    stand_in,
    volume,
)


class FakeClock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.slept.append(seconds)
        self.now += seconds


Connect = Callable[..., Client]
BUSY = Reply(503, {"title": "Busy", "code": "target-unavailable", "detail": "later"}, {"Retry-After": "7"})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def connect(service: StandIn, clock: FakeClock) -> Connect:
    def client(**settings: Any) -> Client:
        return Client(Config(**{"endpoint": service.url, "token": "tok-1", **settings}), clock=clock)

    return client


def test_a_token_signs_in(service: StandIn, connect: Connect) -> None:
    service.on("GET", "/v1/whoami", Reply(document={"name": "alice"}))
    assert connect().get("/v1/whoami") == {"name": "alice"}
    assert service.requests[0].headers["Authorization"] == "Bearer tok-1"


def test_a_password_of_any_letters_signs_in(service: StandIn, connect: Connect) -> None:
    service.on("GET", "/v1/whoami", Reply(document={}))
    connect(token=None, username="alice", password="pässwörd:€").get("/v1/whoami")
    scheme, _, pair = service.requests[0].headers["Authorization"].partition(" ")
    assert (scheme, base64.b64decode(pair).decode()) == ("Basic", "alice:pässwörd:€")


def test_neither_netrc_nor_a_proxy_comes_between(
    service: StandIn, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login eve password eve\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    service.on("GET", "/v1/whoami", Reply(document={}))
    connect().get("/v1/whoami")
    assert service.requests[0].headers["Authorization"] == "Bearer tok-1"


def test_a_repeated_change_keeps_its_key(service: StandIn, connect: Connect, clock: FakeClock) -> None:
    service.on("POST", "/v1/volumes", Reply(drop=True), BUSY, Reply(201, volume()))
    assert connect().mutate("POST", "/v1/volumes", {"size": 1}).document["id"] == VOLUME
    keys = {request.headers["Idempotency-Key"] for request in service.requests}
    assert len(service.requests) == 3
    assert len(keys) == 1
    assert 8 <= len(keys.pop()) <= 255
    assert [request.body for request in service.requests] == [{"size": 1}] * 3
    assert clock.slept == [0.25, 7.0]


def test_the_first_sending_of_a_change_is_waited_for(service: StandIn, connect: Connect, clock: FakeClock) -> None:
    still_at_it = [problem(409, "idempotency-in-flight")] * 12
    service.on("POST", "/v1/volumes", Reply(drop=True), *still_at_it, Reply(201, volume()))
    assert connect().mutate("POST", "/v1/volumes", {"size": 1}).status == 201
    assert clock.slept == [0.25] + [1] * 12
    assert len({request.headers["Idempotency-Key"] for request in service.requests}) == 1


def test_waiting_for_the_first_sending_is_bounded(service: StandIn, connect: Connect) -> None:
    service.on("POST", "/v1/volumes", problem(409, "idempotency-in-flight"))
    with pytest.raises(Problem) as caught:
        connect().mutate("POST", "/v1/volumes", {"size": 1})
    assert caught.value.exit_code == 4


def test_two_changes_have_two_keys(service: StandIn, connect: Connect) -> None:
    service.on("POST", "/v1/volumes", Reply(201, volume()))
    client = connect()
    client.mutate("POST", "/v1/volumes", {})
    client.mutate("POST", "/v1/volumes", {})
    first, second = (request.headers["Idempotency-Key"] for request in service.requests)
    assert first != second


def test_repeating_is_bounded(service: StandIn, connect: Connect) -> None:
    service.on("GET", "/v1/whoami", BUSY)
    with pytest.raises(Problem) as caught:
        connect().get("/v1/whoami")
    assert caught.value.exit_code == 7
    assert len(service.requests) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 429, 500, 502, 504])
def test_a_refusal_is_not_repeated(service: StandIn, connect: Connect, status: int) -> None:
    service.on("POST", "/v1/volumes", problem(status, "no"))
    with pytest.raises(Problem):
        connect().mutate("POST", "/v1/volumes", {})
    assert len(service.requests) == 1


def test_a_closed_port_is_tried_again_and_told(clock: FakeClock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said: list[str] = []
    with pytest.raises(Unreachable, match="Connection refused") as caught:
        Client(Config(f"http://127.0.0.1:{port}"), notify=said.append, clock=clock).get("/v1/whoami")
    assert caught.value.exit_code == 7
    assert clock.slept == [0.25, 0.75, 2.0]
    assert len(said) == 3


def test_no_redirect_is_followed(service: StandIn, connect: Connect) -> None:
    with stand_in() as elsewhere:
        service.on("GET", "/v1/whoami", Reply(307, None, {"Location": elsewhere.url + "/v1/whoami"}))
        with pytest.raises(StratusError, match="sends us on to") as caught:
            connect().get("/v1/whoami")
        assert elsewhere.requests == []
    assert "--endpoint" in str(caught.value.hint)


@pytest.mark.parametrize("content", ["<html>Hello</html>", "[1]", ""])
def test_something_else_than_the_service_is_noticed(service: StandIn, connect: Connect, content: str) -> None:
    service.on("GET", "/v1/whoami", Reply(200, content))
    with pytest.raises(StratusError, match="no Stratus service"):
        connect().get("/v1/whoami")


@pytest.mark.parametrize("document", ["<html>Bad gateway</html>", [1], {"errors": "many"}, {"errors": [1]}])
def test_a_refusal_of_something_else_is_still_told(service: StandIn, connect: Connect, document: Any) -> None:
    service.on("GET", "/v1/whoami", Reply(502, document))
    with pytest.raises(Problem, match="answered with status 502"):
        connect().get("/v1/whoami")


def test_pages_are_walked_to_the_end(service: StandIn, connect: Connect) -> None:
    one, two, three = {"id": 1}, {"id": 2}, {"id": 3}
    pages = [{"items": [one, two], "next": "b"}, {"items": [three], "next": "c"}, {"items": [], "next": None}]
    service.on("GET", "/v1/volumes", *(Reply(document=page) for page in pages))
    assert list(connect().pages("/v1/volumes", {"owner": "al&ice"})) == [one, two, three]
    assert [request.query.get("next") for request in service.requests] == [None, "b", "c"]
    assert {request.query["owner"] for request in service.requests} == {"al&ice"}


def test_a_cursor_that_stands_still_ends_the_walk(service: StandIn, connect: Connect) -> None:
    service.on("GET", "/v1/volumes", Reply(document={"items": [{}], "next": "b"}))
    assert list(connect().pages("/v1/volumes")) == [{}, {}]


def test_waiting_shows_progress_until_the_end(service: StandIn, connect: Connect) -> None:
    looks = [operation("running", 40), operation("running", 80), operation("succeeded", 100)]
    service.on("GET", f"/v1/operations/{OPERATION}", *(Reply(document=look) for look in looks))
    service.on("GET", f"/v1/volumes/{VOLUME}", Reply(document=volume()))
    seen: list[int] = []
    client = connect()
    finished = client.wait_for(operation("queued"), lambda each: seen.append(each["progress"]))
    assert seen == [0, 40, 80, 100]
    assert service.requests[0].query == {"wait": "1"}
    assert client.resource(finished)["id"] == VOLUME


def test_a_service_that_does_not_hold_is_not_asked_in_a_loop(
    service: StandIn, connect: Connect, clock: FakeClock
) -> None:
    looks = [Reply(document=operation())] * 5 + [Reply(document=operation("succeeded"))]
    service.on("GET", f"/v1/operations/{OPERATION}", *looks)
    connect().wait_for(operation())
    assert clock.slept == [0.5] * 5


@pytest.mark.parametrize(
    ("code", "exit_code"), [("target-failed", 7), ("pool-failed", 7), ("pool-full", 4), ("cancelled", 1), ("", 1)]
)
def test_a_failed_operation_says_why(connect: Connect, code: str, exit_code: int) -> None:
    failed = operation("failed", error={"code": code, "detail": "the pool is full"})
    with pytest.raises(OperationFailed, match="the pool is full") as caught:
        connect().wait_for(failed)
    assert caught.value.exit_code == exit_code


def test_a_cancelled_operation_is_no_success(connect: Connect) -> None:
    with pytest.raises(OperationFailed, match="cancelled"):
        connect().wait_for(operation("cancelled"))


def test_waiting_ends_with_the_time(service: StandIn, connect: Connect) -> None:
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(document=operation("running", 5)))
    with pytest.raises(StillRunning) as caught:
        connect(timeout=3.0).wait_for(operation())
    assert caught.value.exit_code == 6
    assert f"stratus-describe-operations --wait {OPERATION}" in str(caught.value.hint)


def test_losing_the_service_while_waiting_tells_how_to_go_on(service: StandIn, connect: Connect) -> None:
    service.on("GET", f"/v1/operations/{OPERATION}", Reply(drop=True))
    with pytest.raises(Unreachable) as caught:
        connect().wait_for(operation())
    assert OPERATION in str(caught.value.hint)


def test_an_interrupt_while_waiting_names_the_operation(connect: Connect) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"{OPERATION} .* goes on"):
        connect().wait_for(operation(), interrupt)


def test_a_silent_service_is_a_matter_of_time(service: StandIn, connect: Connect) -> None:
    service.on("GET", "/v1/whoami", Reply(document={}, after=1.0))
    with pytest.raises(TimedOut) as caught:
        connect(timeout=0.2).get("/v1/whoami")
    assert caught.value.exit_code == 6
    assert len(service.requests) == 1


def test_repeating_ends_with_the_time(service: StandIn, connect: Connect) -> None:
    service.on("GET", "/v1/whoami", BUSY)
    with pytest.raises(TimedOut):
        connect(timeout=5.0).get("/v1/whoami")
    assert len(service.requests) == 1


def test_a_held_answer_and_a_plan_are_asked_for(service: StandIn, connect: Connect) -> None:
    service.on("DELETE", f"/v1/volumes/{VOLUME}", accepted(), Reply(204))
    client = connect()
    answer = client.mutate("DELETE", f"/v1/volumes/{VOLUME}", hold=0)
    assert answer.operation == operation()
    assert client.mutate("DELETE", f"/v1/volumes/{VOLUME}", params={"force": "true"}, dry_run=True).operation is None
    first, second = service.requests
    assert first.headers["Prefer"] == "wait=0"
    assert first.query == {}
    assert second.query == {"force": "true", "dry_run": "true"}


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of its own authority for 127.0.0.1, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stand-in")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + made.public_bytes(pem))
    return path


def test_only_a_trusted_certificate_sees_the_token(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    with stand_in(certificate) as server:
        server.on("GET", "/v1/whoami", Reply(document={"name": "alice"}))
        with pytest.raises(Untrusted) as caught:
            Client(Config(server.url, token="tok-1")).get("/v1/whoami")
        assert server.requests == []
        assert Client(Config(server.url, cacert=certificate)).get("/v1/whoami") == {"name": "alice"}
    assert caught.value.exit_code == 7
    assert "--cacert" in str(caught.value.hint)
