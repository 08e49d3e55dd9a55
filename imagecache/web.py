"""GET from servers nobody vouches for, at addresses that were checked: the only way out of this room.

http.client over a socket of our own, and nothing that reads the environment: no proxies, no .netrc, no cookies, no
decoding. Each redirect is followed by hand and checked as the first URL was.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urljoin

from .addresses import Address, Url, address_of, is_allowed, networks, parse, shown
from .errors import AddressRefused, BadUrl, TooLarge, TooManyRedirects, Unreachable

MAX_REDIRECTS = 5
MAX_ADDRESSES = 4
"""Tried of one host, each for `connect_timeout`."""
DOCUMENT_TIMEOUT = 60.0
"""Seconds for a whole document, redirects included."""
LEAST_RATE = 1024
"""Bytes a second that a body must bring, over each WINDOW seconds spent waiting for it."""
WINDOW = 60.0
TICK = 0.2
"""Seconds between two looks at `check`, whatever is waited for."""

Check = Callable[[], None]
Resolve = Callable[..., Sequence[tuple[Any, ...]]]
T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A small body, read whole. `url` is where it was found at last."""

    url: str
    content_type: str
    body: bytes


class Response:
    """An answer whose body is still to be read. `url` is where it was found at last, `headers` are its headers (case
    does not matter), `length` the bytes of the body if the server said so."""

    def __init__(self, url: str, raw: http.client.HTTPResponse) -> None:
        self.url = url
        self.status = raw.status
        self.headers = raw.headers
        self.length = raw.length
        self._raw = raw
        self._left = raw.length

    def readinto(self, buffer: bytearray | memoryview) -> int:
        """Put what has come, and fits, into `buffer`; bytes put, 0 at the end. Raises Unreachable for a body that ends
        before its end, or does not get on; whatever `check` raises."""
        with _told(self.url):
            data = self._raw.read1(len(buffer) if self._left is None else min(len(buffer), self._left))
        if self._left is not None:
            if not data and self._left and len(buffer):
                raise Unreachable(f"{shown(self.url)}: the connection ended {self._left} bytes before the end")
            self._left -= len(data)
        memoryview(buffer)[: len(data)] = data
        return len(data)


class Web:
    """What a service reads from the network.

    Only public addresses, and those in `allow_networks` (CIDRs), are connected to. Timeouts are in seconds:
    `connect_timeout` for each of resolving, connecting and the TLS handshake; `read_timeout` for the headers of an
    answer and for any wait for more of the body. `ca_file` (PEM) is trusted beside the system's CAs. `resolve` is
    getaddrinfo, or answers as it does.
    """

    def __init__(
        self,
        allow_networks: Sequence[str] = (),
        *,
        connect_timeout: float = 10.0,
        read_timeout: float = 30.0,
        ca_file: Path | None = None,
        resolve: Resolve = socket.getaddrinfo,
    ) -> None:
        self._allowed = networks(allow_networks)
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._resolve = resolve
        self._ca_file = ca_file

    def open(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        allowed: Collection[int] = (),
        check: Check = lambda: None,
        timeout: float | None = None,
    ) -> AbstractContextManager[Response]:
        """The answer to a GET, its redirects followed; the connection is closed at the end of the `with`.

        `allowed` are status codes that the caller understands beside the 2xx. `check` is called about every TICK
        seconds while we wait, in the caller's thread, until the `with` ends; what it raises (no OSError) ends the
        waiting. `timeout` is for everything, the body included; None: as long as the body gets on.

        Raises BadUrl, AddressRefused, TooManyRedirects, Unreachable (with `status`, if it was that).
        """
        patience = _Patience(check, None if timeout is None else time.monotonic() + timeout)
        return self._follow(url, headers or {}, allowed, patience)

    def read(
        self, url: str, limit: int, *, headers: Mapping[str, str] | None = None, check: Check = lambda: None
    ) -> Document:
        """A document of up to `limit` bytes, within DOCUMENT_TIMEOUT. Raises TooLarge, and what `open` does."""
        with self.open(url, headers, check=check, timeout=DOCUMENT_TIMEOUT) as response:
            body, buffer = bytearray(), bytearray(64 << 10)
            while got := response.readinto(buffer):
                body += buffer[:got]
                if len(body) > limit:
                    raise TooLarge(f"{shown(response.url)}: more than the {limit} bytes that such a document may have")
            return Document(response.url, response.headers.get("Content-Type", ""), bytes(body))

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.sslsocket_class = _TlsSocket
        if self._ca_file is not None:
            context.load_verify_locations(self._ca_file)
        return context

    @contextmanager
    def _follow(
        self, url: str, headers: Mapping[str, str], allowed: Collection[int], patience: _Patience
    ) -> Iterator[Response]:
        start = url
        for _ in range(MAX_REDIRECTS + 1):
            with self._get(url, headers, patience) as response:
                location = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or location is None:
                    _expect(response, allowed)
                    yield response
                    return
                url = _redirected(url, location)  # the body stays unread: nothing says how long it is
        raise TooManyRedirects(f"{shown(start)}: more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def _get(self, url: str, headers: Mapping[str, str], patience: _Patience) -> Iterator[Response]:
        parts = parse(url)
        with _told(url), contextlib.ExitStack() as opened:
            connection = http.client.HTTPConnection(parts.host, parts.port)
            opened.callback(connection.close)
            connection.sock = self._connect(url, parts, patience)
            with patience.at_most(self._read_timeout):
                connection.request("GET", parts.target, headers={**headers, **_headers(parts)})
                raw = connection.getresponse()
            opened.callback(raw.close)
            kept = opened.pop_all()
        with kept:
            yield Response(url, raw)

    def _connect(self, url: str, parts: Url, patience: _Patience) -> _Socket | _TlsSocket:
        causes = []
        for family, address in self._addresses(url, parts, patience):
            try:
                return self._dial(family, address, parts, patience)
            except (OSError, Unreachable) as error:
                causes.append(f"{address[0]}: {error}")
        raise Unreachable(f"{shown(url)}: {'; '.join(causes)}")

    def _addresses(self, url: str, parts: Url, patience: _Patience) -> list[tuple[int, tuple[Any, ...]]]:
        """Where to connect, by family; only addresses that were checked."""
        found = self._look_up(parts, patience)
        good = [(info[0], info[4]) for info in found if self._is_allowed(address_of(info[4][0]))]
        if not good:  # what they are is not told: names of the site's own network are not for everybody
            raise AddressRefused(f"{shown(url)}: {parts.host} has no public address, nor one that the site allows")
        return good[:MAX_ADDRESSES]

    def _is_allowed(self, address: Address | None) -> bool:
        return address is not None and is_allowed(address, self._allowed)

    def _look_up(self, parts: Url, patience: _Patience) -> Sequence[tuple[Any, ...]]:
        """getaddrinfo has no timeout and cannot be interrupted: a thread asks, and is left alone if it takes long."""
        answers: queue.SimpleQueue[Sequence[tuple[Any, ...]] | OSError | UnicodeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self._resolve(parts.host, parts.port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        answer = patience.wait(lambda: _taken(answers), self._connect_timeout, f"resolving {parts.host}")
        if isinstance(answer, Exception):
            raise OSError(f"{parts.host} has no address: {answer}")
        return answer

    def _dial(self, family: int, address: tuple[Any, ...], parts: Url, patience: _Patience) -> _Socket | _TlsSocket:
        plain = _Socket(family, socket.SOCK_STREAM)
        try:
            plain.setblocking(False)
            plain.connect_ex(address)
            patience.wait(lambda: _connected(plain), self._connect_timeout, "connecting")
            plain.patience, plain.idle = patience, self._read_timeout
            plain.settimeout(TICK)
            return plain if parts.scheme == "http" else self._shake_hands(plain, parts.host)
        except BaseException:
            plain.close()
            raise

    def _shake_hands(self, plain: _Socket, host: str) -> _TlsSocket:
        wrapped = self._tls.wrap_socket(
            plain, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        assert isinstance(wrapped, _TlsSocket)
        wrapped.patience, wrapped.idle = plain.patience, plain.idle
        try:
            plain.patience.wait(wrapped.do_handshake, self._connect_timeout, "the TLS handshake")
        except BaseException:
            wrapped.close()
            raise
        return wrapped


class _Patience:
    """How long we wait: not past `deadline` (time.monotonic), and only while `check` lets us."""

    def __init__(self, check: Check, deadline: float | None) -> None:
        self._check = check
        self._deadline = deadline
        self._looked = 0.0
        self._waited = 0.0
        self._received = 0

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """An earlier deadline for a part."""
        whole, part = self._deadline, time.monotonic() + seconds
        self._deadline = part if whole is None else min(whole, part)
        try:
            yield
        finally:
            self._deadline = whole

    def wait(self, attempt: Callable[[], T], seconds: float, what: str) -> T:
        """What `attempt` returns, once it raises no TimeoutError; each attempt takes up to TICK."""
        until = time.monotonic() + seconds
        while True:
            self._look(what)
            try:
                return attempt()
            except TimeoutError:
                if time.monotonic() >= until:
                    raise Unreachable(f"{what} took longer than {seconds:g} s") from None

    def receive(self, attempt: Callable[[], int], idle: float) -> int:
        """Like `wait`, and counts: a body that drips is not waited for. Time that the caller takes does not count."""
        begun = time.monotonic()
        got = self.wait(attempt, idle, "waiting for the server")
        self._waited += time.monotonic() - begun
        self._received += got
        if self._waited >= WINDOW:
            if self._received < LEAST_RATE * self._waited:
                raise Unreachable(f"the server sends fewer than {LEAST_RATE} bytes a second")
            self._waited, self._received = 0.0, 0
        return got

    def _look(self, what: str) -> None:
        now = time.monotonic()
        if now - self._looked >= TICK:
            self._looked = now
            self._check()
        if self._deadline is not None and now >= self._deadline:
            raise Unreachable(f"out of time, {what}")


class _Socket(socket.socket):
    patience: _Patience
    idle: float

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        return self.patience.receive(lambda: socket.socket.recv_into(self, buffer, nbytes, flags), self.idle)


class _TlsSocket(ssl.SSLSocket):
    patience: _Patience
    idle: float

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        return self.patience.receive(lambda: ssl.SSLSocket.recv_into(self, buffer, nbytes, flags), self.idle)


def _connected(plain: socket.socket) -> None:
    poll = select.poll()
    poll.register(plain, select.POLLOUT)
    if not poll.poll(TICK * 1000):
        raise TimeoutError
    if code := plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise ConnectionError(code, os.strerror(code))


def _taken(answers: queue.SimpleQueue[T]) -> T:
    try:
        return answers.get(timeout=TICK)
    except queue.Empty:
        raise TimeoutError from None


def _headers(parts: Url) -> dict[str, str]:
    always = {"Host": parts.host_header, "Accept-Encoding": "identity", "Connection": "close"}
    if parts.userinfo is None:
        return always
    credentials = base64.b64encode(unquote(parts.userinfo).encode()).decode()
    return {**always, "Authorization": f"Basic {credentials}"}


def _expect(response: Response, allowed: Collection[int]) -> None:
    if not 200 <= response.status < 300 and response.status not in allowed:
        raise Unreachable(f"{shown(response.url)}: the server answered {response.status}", response.status)


def _redirected(url: str, location: str) -> str:
    """The next URL. Userinfo stays with its host: only a relative redirect keeps it. https does not become http."""
    printable = "".join(map(chr, range(0x21, 0x7F)))
    try:
        target = urljoin(url, quote(location.strip().encode("latin-1", "replace"), safe=printable))
    except ValueError:
        raise BadUrl(f"{shown(url)}: redirected to what is no URL") from None
    if url.startswith("https:") and not target.startswith("https:"):
        raise BadUrl(f"{shown(url)}: redirected away from https, to {shown(target)}")
    return target


@contextmanager
def _told(url: str) -> Iterator[None]:
    """What goes wrong below HTTP is told as the URL's fault."""
    try:
        yield
    except Unreachable as error:
        if shown(url) in str(error):
            raise
        raise Unreachable(f"{shown(url)}: {error}", error.status) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(f"{shown(url)}: {str(error)[:200] or type(error).__name__}") from error
