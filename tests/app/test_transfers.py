"""Places for transfers, and connections that are ended when a client does not move."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from app.errors import Problem
from app.factory import create_app
from app.ids import new_id
from app.transfers import Line, Places, Sending, receiving
from tests.support.databases import settings_for

ALICE, BOB, CAROL = new_id(), new_id(), new_id()
LONG = 600.0


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The service's end of a connection and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    client.settimeout(30)
    with ours, client:
        yield ours, client


# ---------------------------------------------------------------- places


def test_nobody_has_more_than_half_and_all_no_more_than_there_are() -> None:
    places = Places(4)
    for who in (ALICE, ALICE, BOB):
        places.take(who)
    with pytest.raises(Problem, match="transfers-busy"):
        places.take(ALICE)
    places.take(CAROL)
    with pytest.raises(Problem, match="transfers-busy") as refused:
        places.take(BOB)
    assert refused.value.headers["Retry-After"].isdigit()
    places.give_back(ALICE)
    places.take(BOB)


@pytest.mark.parametrize("total", [0, 1])
def test_there_is_one_place_at_least(total: int) -> None:
    places = Places(total)
    places.take(ALICE)
    with pytest.raises(Problem, match="transfers-busy"):
        places.take(BOB)
    places.give_back(ALICE)
    places.take(BOB)


def test_many_at_once_take_no_place_twice() -> None:
    places, taken = Places(16), []
    start = threading.Barrier(40)

    def come() -> None:
        start.wait(30)
        try:
            places.take(new_id())
        except Problem:
            return
        taken.append(1)

    threads = [threading.Thread(target=come) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(taken) == 16


# ---------------------------------------------------------------- lines


def test_who_stands_still_is_not_waited_for(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    line = Line(ours)
    line.begin(0.05, 1 << 40)
    with pytest.raises(TimeoutError):
        ours.recv(1)
    line.done()


def test_who_crawls_is_cut_off_all_the_same(ends: tuple[socket.socket, socket.socket]) -> None:
    """A byte now and then is never idle; for no bytes at all there is only the idle time."""
    ours, client = ends
    over = threading.Event()

    def crawl() -> None:
        try:
            while not over.wait(0.02):
                client.sendall(b"x")
        except OSError:
            pass

    crawler = threading.Thread(target=crawl)
    line = Line(ours)
    line.begin(0.5, 0)
    crawler.start()
    while ours.recv(1):
        pass
    over.set()
    crawler.join(30)
    line.done()


def test_one_that_is_done_in_time_is_left_alone(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, client = ends
    line = Line(ours)
    line.begin(0.05, 0)
    line.done()
    assert line._end is not None
    line._end.join(30)
    client.sendall(b"x")
    ours.settimeout(30)
    assert ours.recv(1) == b"x"


def test_without_a_connection_nothing_is_bounded() -> None:
    line = Line(None)
    line.begin(0.0, 0)
    line.swallow(cast("BinaryIO", None), 5)
    line.cut()
    line.done()


# ---------------------------------------------------------------- bodies


def test_a_body_that_is_refused_is_read_if_it_is_there(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, client = ends
    client.sendall(bytes(100_000))
    with (
        ours.makefile("rb") as body,
        pytest.raises(Problem),
        receiving(Places(1), ALICE, Line(ours), body, 100_000, LONG),
    ):
        raise Problem(409, "upload-busy", "no")
    client.sendall(b"next")
    assert ours.recv(4) == b"next"


def test_a_body_that_is_refused_is_not_waited_for(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, client = ends
    client.sendall(bytes(10))
    with ours.makefile("rb") as body, pytest.raises(Problem), receiving(Places(1), ALICE, Line(ours), body, 100, LONG):
        raise Problem(409, "upload-busy", "no")
    assert ours.recv(1) == b""  # for who reads on, it has ended
    ours.sendall(b"409")
    assert client.recv(3) == b"409"  # and the answer goes out


@pytest.mark.parametrize("path", ["/nowhere", "/v1/volumes"])
def test_what_is_left_of_a_refused_request_is_not_waited_for(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path, sqlite_template: Path, path: str
) -> None:
    """The server would, whatever it was: here nobody is signed in, or nothing is there."""
    ours, client = ends
    app = create_app(settings_for(tmp_path, f"sqlite:///{sqlite_template}"))
    with ours.makefile("rb") as body:
        given = {"wsgi.input": body, "gunicorn.socket": ours, "CONTENT_LENGTH": "100"}
        client.sendall(bytes(10))
        answer = app.test_client().post(path, environ_overrides=given)
        assert answer.status_code in (401, 404)
    assert ours.recv(1) == b""


def test_a_request_that_was_read_leaves_its_connection_open(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path, sqlite_template: Path
) -> None:
    ours, client = ends
    app = create_app(settings_for(tmp_path, f"sqlite:///{sqlite_template}"))
    client.sendall(bytes(10))
    with ours.makefile("rb") as body:
        given = {"wsgi.input": body, "gunicorn.socket": ours, "CONTENT_LENGTH": "10"}
        assert app.test_client().post("/nowhere", environ_overrides=given).status_code == 404
    client.sendall(b"next")
    assert ours.recv(4) == b"next"


def test_who_has_no_place_is_not_read_at_all(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, client = ends
    places = Places(1)
    places.take(BOB)
    with ours.makefile("rb") as body:
        with pytest.raises(Problem, match="transfers-busy"), receiving(places, ALICE, Line(ours), body, 100, LONG):
            raise AssertionError("there is no place")
        assert body.read(1) == b""
    ours.sendall(b"503")
    assert client.recv(3) == b"503"


def test_no_more_is_read_than_the_body_has(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, client = ends
    client.sendall(b"bodynext")
    places = Places(1)
    with ours.makefile("rb") as body, receiving(places, ALICE, Line(ours), body, 4, LONG) as read:
        assert read(100) == b"body"
        assert read(100) == b""
    places.take(ALICE)  # it was given back


# ---------------------------------------------------------------- files


def test_a_file_is_sent_from_where_to_where_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    places = Places(1)
    places.take(ALICE)
    sending = Sending(path.open("rb", buffering=0), 10, 100, Line(None), places, ALICE)
    assert sending.read(60) + sending.read(60) + sending.read(60) == bytes(range(10, 110))
    for _ in range(2):  # closed twice, a place is given back once
        sending.close()
    places.take(ALICE)
    with pytest.raises(Problem):
        places.take(BOB)


def test_a_connection_that_failed_is_cut_off_when_its_file_is_closed(
    tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, client = ends
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    places = Places(1)
    places.take(ALICE)
    line = Line(ours)
    line.begin(LONG, 10)
    sending = Sending(path.open("rb", buffering=0), 0, 10, line, places, ALICE)
    with pytest.raises(TimeoutError), closing(sending):
        raise TimeoutError
    assert client.recv(1) == b""
    places.take(ALICE)
