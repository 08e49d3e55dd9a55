"""The way out: which addresses are reached, and how long and how much a server may make us wait and read."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagecache import web as web_module
from imagecache.addresses import address_of, is_allowed, parse, shown
from imagecache.errors import AddressRefused, BadUrl, ImageError, TooLarge, TooManyRedirects, Unreachable
from imagecache.web import Response, Web
from tests.support.certificates import server_certificate
from tests.support.wire import Wire, ok, redirect, say, wire

LOOPBACK = ("127.0.0.0/8", "::1/128")
REFUSED_HOSTS = (
    "127.0.0.1",
    "localhost",
    "169.254.169.254",
    "[::ffff:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[::127.0.0.1]",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "0.0.0.0",
    "[::]",
    "[::1]",
    "[fe80::1]",
    "[fc00::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::808:808]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::1]",
    "[2001:db8::1]",
    "[2001::1]",
    "[3fff::1]",
    "192.88.99.1",
    "192.0.0.192",
    "168.63.129.16",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "0x7f000001",
    "0x7f.0.0.1",
    "0x7F.1",
    "0",
    "127.1",
    "127.0.0.1.",
    "127.0.0.01",
    "[fe80::1%25lo]",
)
OTHER_SCHEMES = ("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "data:text/plain,x", "//127.0.0.1/x")


class Cancelled(Exception):
    pass


def cancel() -> None:
    raise Cancelled


def after(times: int) -> Callable[[], None]:
    """A check that cancels when it is called for the last of so many times."""
    left = iter(range(times - 1))

    def check() -> None:
        if next(left, None) is None:
            raise Cancelled

    return check


def names(**addresses: list[str]) -> Callable[..., list[tuple[Any, ...]]]:
    """A resolver that knows these names (`a_b` is a.b), and counts its answers in its own attribute."""

    def resolve(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        known = addresses.get(host.replace(".", "_"), [host])
        return [info for address in known for info in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)]

    return resolve


def body_of(response: Response) -> bytes:
    buffer, body = bytearray(1 << 16), b""
    while got := response.readinto(buffer):
        body += buffer[:got]
    return body


@pytest.fixture
def web() -> Web:
    return Web(LOOPBACK, connect_timeout=5, read_timeout=5)


@pytest.fixture
def target() -> Iterator[Wire]:
    """What nobody should reach."""
    with wire(say(ok("secret"))) as server:
        yield server


# ---------------------------------------------------------------- what is asked and answered


def test_a_document(web: Web) -> None:
    with wire(say(ok("hello", 'ETag: "x"\r\n'))) as server:
        document = web.read(f"{server.url}/a/b?c=d#e", 5)
        assert (document.url, document.content_type, document.body) == (
            f"{server.url}/a/b?c=d#e",
            "text/plain",
            b"hello",
        )
    (head,) = server.requests
    assert head.startswith("GET /a/b?c=d HTTP/1.1\r\n")
    assert f"\r\nHost: 127.0.0.1:{server.port}\r\n" in head
    assert "\r\nAccept-Encoding: identity\r\n" in head


def test_headers_go_there_and_back(web: Web) -> None:
    answer = "HTTP/1.1 206 Partial\r\ncontent-range: bytes 5-9/10\r\nContent-Length: 5\r\n\r\nhello"
    with wire(say(answer)) as server, web.open(server.url, {"Range": "bytes=5-", "If-Range": '"x"'}) as response:
        assert (response.status, response.length) == (206, 5)
        assert response.headers["Content-Range"] == "bytes 5-9/10"
        assert body_of(response) == b"hello"
        assert response.readinto(bytearray(1)) == 0
    assert '\r\nRange: bytes=5-\r\nIf-Range: "x"\r\n' in server.requests[0]


def test_a_caller_cannot_turn_compression_on(web: Web) -> None:
    with wire(say(ok())) as server, web.open(server.url, {"Accept-Encoding": "gzip", "Host": "other"}):
        pass
    assert "gzip" not in server.requests[0]
    assert "other" not in server.requests[0]


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_a_body_in_pieces(web: Web, size: int) -> None:
    chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
    closing = "HTTP/1.0 200 OK\r\n\r\nhello"
    for answer in (ok(), chunked, closing):
        with wire(say(answer)) as server, web.open(server.url) as response:
            buffer, body = memoryview(bytearray(size)), b""
            while got := response.readinto(buffer):
                body += buffer[:got]
            assert body == b"hello"


def test_ipv6(web: Web) -> None:
    with wire(say(ok()), host="::1") as server:
        assert web.read(f"http://[::1]:{server.port}/", 10).body == b"hello"
    assert f"\r\nHost: [::1]:{server.port}\r\n" in server.requests[0]


@pytest.mark.parametrize("status", [304, 400, 404, 416, 500, 503])
def test_other_answers(web: Web, status: int) -> None:
    with wire(say(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n")) as server:
        with pytest.raises(Unreachable, match=str(status)) as raised, web.open(server.url):
            pass
        assert raised.value.status == status
        with web.open(server.url, allowed={status}) as response:
            assert response.status == status


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("host", REFUSED_HOSTS)
def test_a_host_that_is_refused(host: str, target: Wire) -> None:
    with pytest.raises((AddressRefused, BadUrl)):
        Web().read(f"http://{host}:{target.port}/", 10)
    assert target.connections == 0


@pytest.mark.parametrize("host", REFUSED_HOSTS)
def test_a_redirect_to_a_host_that_is_refused(host: str, target: Wire) -> None:
    with wire(say(redirect(f"http://{host}:{target.port}/")), host="127.0.0.2") as server:
        with pytest.raises((AddressRefused, BadUrl)):
            Web(["127.0.0.2/32"]).read(server.url, 10)
        assert len(server.requests) == 1
    assert target.connections == 0


@pytest.mark.parametrize(
    "host", ["2130706433", "017700000001", "0177.0.0.1", "0x7f000001", "0x7f.1", "127.1", "0", "[::ffff:127.0.0.1]"]
)
def test_other_ways_to_write_an_allowed_address_are_none(host: str, target: Wire) -> None:
    with pytest.raises((AddressRefused, BadUrl)):
        Web(["127.0.0.0/8", "0.0.0.0/8"]).read(f"http://{host}:{target.port}/", 10)
    assert target.connections == 0


@pytest.mark.parametrize("url", OTHER_SCHEMES)
def test_other_schemes(url: str, web: Web) -> None:
    with pytest.raises(BadUrl):
        web.read(url, 10)


@pytest.mark.parametrize("url", OTHER_SCHEMES[:4])
def test_a_redirect_to_another_scheme(url: str, web: Web) -> None:
    with wire(say(redirect(url))) as server, pytest.raises(BadUrl, match="only http and https"):
        web.read(server.url, 10)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///path",
        "http://host:0/",
        "http://host:65536/",
        "http://host:port/",
        "http://ho st/",
        "http://host/a b",
        "http://host/\r\nX: y",
        "http://host/\x00",
        "http://host\\@other/",
        "http://hóst/",
        "http://127。0。0。1/",
        "http://[::1/",
        "http://-host/",
        "http://host..example/",
        "http://%6c%6f/",
    ],
)
def test_what_is_no_url(url: str, web: Web) -> None:
    with pytest.raises(BadUrl):
        web.read(url, 10)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses(address: str) -> None:
    assert is_allowed(ipaddress.ip_address(address), ())


@pytest.mark.parametrize("host", [host for host in REFUSED_HOSTS if address_of(host.strip("[]"))])
def test_addresses_that_are_not_public(host: str) -> None:
    assert not is_allowed(ipaddress.ip_address(host.strip("[]")), ())


def test_names_in_urls() -> None:
    assert parse("http://Cloud.Example.org/x").host == "cloud.example.org"
    assert parse("https://u:p@example.org:8443/x?y#z").target == "/x?y"
    assert parse("http://3com.example/").host == "3com.example"
    assert parse("http://example.org").target == "/"


def test_a_name_with_private_addresses_only(target: Wire) -> None:
    web = Web(resolve=names(inside_example=["127.0.0.1", "10.0.0.1", "::1"]))
    with pytest.raises(AddressRefused, match="no public address") as raised:
        web.read(f"http://inside.example:{target.port}/", 10)
    assert "10.0.0.1" not in str(raised.value)
    assert target.connections == 0


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_with_both_is_reached_at_the_allowed_one_only(order: int, target: Wire) -> None:
    """The allowed one stands for the public one: there is no public Internet here."""
    with wire(say(ok()), host="127.0.0.2") as server:
        resolve = names(both_example=["127.0.0.1", "127.0.0.2"][::order])
        with socket.create_server(("127.0.0.1", server.port)) as trap:
            document = Web(["127.0.0.2/32"], resolve=resolve).read(f"http://both.example:{server.port}/", 10)
            trap.settimeout(0.2)
            with pytest.raises(TimeoutError):
                trap.accept()
    assert document.body == b"hello"
    assert f"Host: both.example:{server.port}" in server.requests[0]


def test_what_was_checked_is_connected_to() -> None:
    """A name that answers something else when it is asked again (DNS rebinding) is not asked again."""
    answers = iter([["127.0.0.2"], ["127.0.0.1"]])

    def resolve(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        return names(rebinding_example=next(answers))(host, port)

    with wire(say(ok()), host="127.0.0.2") as server:
        assert Web(["127.0.0.2/32"], resolve=resolve).read(f"http://rebinding.example:{server.port}/", 10).body
    assert next(answers) == ["127.0.0.1"]


def test_each_redirect_is_resolved_and_checked_anew(target: Wire) -> None:
    answers = iter([["127.0.0.2"], ["127.0.0.1"]])

    def resolve(host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        return names(turning_example=next(answers))(host, port)

    answer = say(redirect(f"http://turning.example:{target.port}/"))
    with wire(answer, host="127.0.0.2") as server, pytest.raises(AddressRefused):
        Web(["127.0.0.2/32"], resolve=resolve).read(f"http://turning.example:{server.port}/", 10)
    assert target.connections == 0


def test_the_next_address_is_tried(web: Web) -> None:
    with wire(say(ok()), host="127.0.0.3") as server:
        web = Web(LOOPBACK, resolve=names(some_example=["127.0.0.2", "127.0.0.3"]))
        assert web.read(f"http://some.example:{server.port}/", 10).body == b"hello"


def test_nobody_listens(web: Web) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Unreachable, match="refused"):
        web.read(f"http://127.0.0.1:{port}/", 10)


def test_no_such_name(web: Web) -> None:
    with pytest.raises(Unreachable, match=r"nowhere\.invalid"):
        web.read("http://nowhere.invalid/", 10)


# ---------------------------------------------------------------- redirects


def hops(count: int) -> Callable[[Wire, socket.socket, str], None]:
    def answer(state: Wire, peer: socket.socket, head: str) -> None:
        number = int(head.split()[1].strip("/"))
        peer.sendall((redirect(f"/{number + 1}") if number < count else ok(str(number))).encode())

    return answer


def test_five_redirects_and_no_more(web: Web) -> None:
    with wire(hops(5)) as server:
        document = web.read(f"{server.url}/0", 10)
        assert (document.url, document.body) == (f"{server.url}/5", b"5")
    with wire(hops(6)) as server:
        with pytest.raises(TooManyRedirects):
            web.read(f"{server.url}/0", 10)
        assert len(server.requests) == 6


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_all_kinds_of_redirects(web: Web, status: int) -> None:
    with wire(say(ok())) as end, wire(say(redirect(f"{end.url}/b%20c?d", status))) as server:
        assert web.read(server.url, 10).body == b"hello"
    assert end.requests[0].startswith("GET /b%20c?d ")


def test_spaces_and_letters_in_a_redirect_are_quoted(web: Web) -> None:
    with wire(say(ok())) as end, wire(say(redirect(f"{end.url}/a b/\xc3\xa9"))) as server:
        assert web.read(server.url, 10).body == b"hello"
    assert end.requests[0].startswith("GET /a%20b/%C3%A9 ")


@pytest.mark.parametrize("target", ["http://[::1", "http://-h/", "http://h:x/"])
def test_a_redirect_to_nonsense(web: Web, target: str) -> None:
    with wire(say(redirect(target))) as server, pytest.raises(BadUrl):
        web.read(server.url, 10)


def test_the_body_of_a_redirect_is_not_read(web: Web) -> None:
    def answer(state: Wire, peer: socket.socket, head: str) -> None:
        peer.sendall(f"HTTP/1.1 302 Found\r\nLocation: {end.url}/\r\n\r\n".encode())
        state.pour(peer, bytes(1 << 16))

    with wire(say(ok())) as end, wire(answer) as server:
        assert web.read(server.url, 10).body == b"hello"
        assert server.idle.wait(10)
        assert server.sent < 64 << 20  # what the kernel's buffers on both sides take


# ---------------------------------------------------------------- how much, how long


def test_a_document_of_its_limit_and_of_more(web: Web) -> None:
    with wire(say(ok("hello"))) as server:
        assert web.read(server.url, 5).body == b"hello"
        with pytest.raises(TooLarge):
            web.read(server.url, 4)


@pytest.mark.parametrize(
    "head", ["HTTP/1.0 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 9999999999999\r\n\r\n"]
)
def test_an_endless_document(web: Web, head: str) -> None:
    def answer(state: Wire, peer: socket.socket, _: str) -> None:
        peer.sendall(head.encode())
        state.pour(peer, bytes(1 << 16))

    with wire(answer) as server:
        with pytest.raises(TooLarge):
            web.read(server.url, 1 << 20)
        assert server.idle.wait(10)
        assert server.sent < 64 << 20


@pytest.mark.parametrize(
    "answer",
    [
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nA\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhello",
    ],
)
def test_a_body_that_ends_too_early(web: Web, answer: str) -> None:
    with (
        wire(say(answer)) as server,
        web.open(server.url) as response,
        pytest.raises(Unreachable, match=str(server.port)),
    ):
        body_of(response)


@pytest.mark.parametrize(
    "answer", ["", "HTTP/1.1 2", "nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\nX: " + "y" * 70000, "X\r\n" * 200]
)
def test_a_head_that_is_none(web: Web, answer: str) -> None:
    with wire(say(answer)) as server, pytest.raises(Unreachable, match=str(server.port)):
        web.read(server.url, 10)


def test_thousands_of_headers(web: Web) -> None:
    with wire(say("HTTP/1.1 200 OK\r\n" + "X: y\r\n" * 5000 + "\r\n")) as server, pytest.raises(Unreachable):
        web.read(server.url, 10)


PIECES = {
    "silence": ("", b""),
    "headers that drip": ("HTTP/1.1 200 OK\r\n", b"X"),
    "endless 100 Continue": ("", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("what", PIECES)
def test_headers_that_take_too_long(what: str) -> None:
    def answer(state: Wire, peer: socket.socket, _: str) -> None:
        peer.sendall(PIECES[what][0].encode())
        state.pour(peer, PIECES[what][1], pause=0.05)

    with wire(answer) as server, pytest.raises(Unreachable):
        Web(LOOPBACK, read_timeout=0.6).read(server.url, 10)


def test_a_body_that_stops_coming() -> None:
    def answer(state: Wire, peer: socket.socket, _: str) -> None:
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        state.wait()

    with wire(answer) as server, Web(LOOPBACK, read_timeout=0.5).open(server.url) as response:
        assert response.readinto(bytearray(100)) == 5
        with pytest.raises(Unreachable, match=r"0\.5 s"):
            response.readinto(bytearray(100))


def dripping(state: Wire, peer: socket.socket, _: str) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    state.pour(peer, b"x", pause=0.02)


def test_a_body_that_drips(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "WINDOW", 0.5)
    with (
        wire(dripping) as server,
        web.open(server.url) as response,
        pytest.raises(Unreachable, match="1024 bytes a second"),
    ):
        body_of(response)


def test_a_document_has_a_deadline(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "DOCUMENT_TIMEOUT", 0.5)
    with wire(dripping) as server, pytest.raises(Unreachable, match="out of time"):
        web.read(server.url, 1 << 20)


def test_a_slow_reader_is_not_a_slow_server(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes between two calls is the caller's."""
    monkeypatch.setattr(web_module, "WINDOW", 0.05)
    with wire(say(ok("hello"))) as server, web.open(server.url) as response:
        threading.Event().wait(0.2)
        assert body_of(response) == b"hello"


# ---------------------------------------------------------------- cancelling


def test_cancel_before_anything(web: Web, target: Wire) -> None:
    with pytest.raises(Cancelled):
        web.read(target.url, 10, check=cancel)


def test_cancel_while_a_name_is_looked_up() -> None:
    release = threading.Event()

    def resolve(*_: object, **__: object) -> list[tuple[Any, ...]]:
        release.wait()
        return []

    try:
        with pytest.raises(Cancelled):
            Web(LOOPBACK, connect_timeout=300, resolve=resolve).read("http://slow.example/", 10, check=after(3))
        with pytest.raises(Unreachable, match=r"resolving slow\.example"):
            Web(LOOPBACK, connect_timeout=0.3, resolve=resolve).read("http://slow.example/", 10)
    finally:
        release.set()


@pytest.fixture
def unanswering() -> Iterator[int]:
    """A port that accepts nobody any more: its queue is full, and SYNs are dropped."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for peer in waiting:
            peer.setblocking(False)
            peer.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for peer in waiting:
            peer.close()


def test_cancel_while_connecting(unanswering: int) -> None:
    with pytest.raises(Cancelled):
        Web(LOOPBACK, connect_timeout=300).read(f"http://127.0.0.1:{unanswering}/", 10, check=after(4))


def test_connecting_takes_too_long(unanswering: int) -> None:
    with pytest.raises(Unreachable, match="connecting took longer"):
        Web(LOOPBACK, connect_timeout=0.4).read(f"http://127.0.0.1:{unanswering}/", 10)


def test_cancel_in_a_tls_handshake() -> None:
    with wire(lambda state, *_: state.wait(), read_request=False) as server:
        url = server.url.replace("http:", "https:")
        with pytest.raises(Cancelled):
            Web(LOOPBACK, connect_timeout=300).read(url, 10, check=after(4))
        with pytest.raises(Unreachable, match="TLS handshake"):
            Web(LOOPBACK, connect_timeout=0.4).read(url, 10)


def test_cancel_while_waiting_for_headers() -> None:
    with wire(lambda state, *_: state.wait()) as server, pytest.raises(Cancelled):
        Web(LOOPBACK, read_timeout=300).read(server.url, 10, check=after(4))


def test_cancel_while_a_body_drips(web: Web) -> None:
    with wire(dripping) as server, pytest.raises(Cancelled), web.open(server.url, check=after(5)) as response:
        body_of(response)


# ---------------------------------------------------------------- TLS


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context for mirror.example and 127.0.0.1, and its CA."""
    authority, chain = server_certificate(tmp_path, "mirror.example", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return context, authority


def over_tls(ca_file: Path | None) -> Web:
    addresses = names(mirror_example=["127.0.0.1"], other_example=["127.0.0.1"])
    return Web(LOOPBACK, connect_timeout=5, read_timeout=5, ca_file=ca_file, resolve=addresses)


@pytest.mark.parametrize("host", ["mirror.example", "127.0.0.1"])
def test_https_with_a_private_ca(tls: tuple[ssl.SSLContext, Path], host: str) -> None:
    with wire(say(ok("h" * 100_000)), tls=tls[0]) as server:
        assert over_tls(tls[1]).read(f"https://{host}:{server.port}/", 100_000).body == b"h" * 100_000
    assert f"Host: {host}:{server.port}" in server.requests[0]


def test_https_of_a_ca_nobody_knows(tls: tuple[ssl.SSLContext, Path]) -> None:
    with wire(say(ok()), tls=tls[0]) as server, pytest.raises(Unreachable, match="certificate verify failed"):
        over_tls(None).read(f"https://mirror.example:{server.port}/", 10)
    assert server.requests == []


def test_https_of_another_host(tls: tuple[ssl.SSLContext, Path]) -> None:
    with wire(say(ok()), tls=tls[0]) as server, pytest.raises(Unreachable, match="certificate verify failed"):
        over_tls(tls[1]).read(f"https://other.example:{server.port}/", 10)
    assert server.requests == []


def test_https_does_not_become_http(tls: tuple[ssl.SSLContext, Path], target: Wire) -> None:
    with wire(say(redirect(target.url)), tls=tls[0]) as server, pytest.raises(BadUrl, match="away from https"):
        over_tls(tls[1]).read(f"https://mirror.example:{server.port}/", 10)
    assert target.connections == 0


def test_https_cut_off(tls: tuple[ssl.SSLContext, Path]) -> None:
    """A body without a length ends with TLS' own end, not with TCP's."""
    with wire(say("HTTP/1.0 200 OK\r\n\r\nhello"), tls=tls[0]) as server, pytest.raises(Unreachable):
        over_tls(tls[1]).read(f"https://mirror.example:{server.port}/", 10)


# ---------------------------------------------------------------- secrets, and the environment


def test_the_environment_has_no_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: Wire) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, target.url)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password word\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with wire(say(ok())) as server:
        assert Web(LOOPBACK).read(server.url, 10).body == b"hello"
    assert target.connections == 0
    assert "Authorization" not in server.requests[0]


def test_userinfo_is_for_its_own_host(web: Web) -> None:
    with wire(say(ok())) as end:

        def answer(state: Wire, peer: socket.socket, head: str) -> None:
            peer.sendall((redirect("/there") if "GET / " in head else redirect(f"{end.url}/")).encode())

        with wire(answer) as server:
            web.read(f"http://us%40er:w:rd@127.0.0.1:{server.port}/", 10)
    assert all("Authorization: Basic dXNAZXI6dzpyZA==" in head for head in server.requests)
    assert len(server.requests) == 2
    assert "Authorization" not in end.requests[0]


@pytest.mark.parametrize(
    "answer", ["HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", redirect("/?token=s3cret"), "nonsense\r\n", ok("x" * 99)]
)
def test_messages_tell_no_secrets(web: Web, answer: str) -> None:
    with wire(say(answer)) as server:
        url = f"http://user:s3cret@127.0.0.1:{server.port}/path?sig=s3cret#s3cret"
        with pytest.raises(ImageError) as raised:
            web.read(url, 10)
    assert "s3cret" not in str(raised.value)
    assert f"http://127.0.0.1:{server.port}/" in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@10.0.0.1/",
        "ftp://user:s3cret@host/",
        "http://user:s3cret@h:x/",
        "http://h/?s3cret\n",
        "http://u:s3/cret@h/",
    ],
)
def test_refusals_tell_no_secrets(url: str) -> None:
    with pytest.raises(ImageError) as raised:
        Web().read(url, 10)
    assert "s3cret" not in str(raised.value)
    assert "cret@" not in str(raised.value)


def test_urls_for_messages() -> None:
    assert shown("https://u:p@Example.org:8443/a/b?c=d#e") == "https://example.org:8443/a/b"
    assert shown("http://[::1]/x\x1b[2J") == "http://[::1]/x?[2J"
    assert shown("http://[") == "a URL that cannot be read"
    assert len(shown("http://h/" + "x" * 10_000)) <= 300
