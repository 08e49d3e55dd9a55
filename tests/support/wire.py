"""Servers that say exactly what a test wants, byte for byte, and remember what they were asked."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Answer = Callable[[socket.socket, str], None]


@dataclass
class Wire:
    """`requests` are the heads of all requests, `connections` the addresses that connected, `sent` the bytes that a
    `pour` got rid of before its client went away."""

    host: str
    port: int
    requests: list[str] = field(default_factory=list)
    connections: int = 0
    sent: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    idle: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def pour(self, peer: socket.socket, piece: bytes, pause: float = 0.0) -> None:
        """The same again and again, until the client or the test has enough."""
        while not self.stopped.wait(pause) if pause else not self.stopped.is_set():
            peer.sendall(piece)
            self.sent += len(piece)

    def wait(self) -> None:
        self.stopped.wait()


@contextmanager
def wire(
    answer: Callable[[Wire, socket.socket, str], None],
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
    read_request: bool = True,
) -> Iterator[Wire]:
    """`answer` gets each connection, with the head of its request; the connection is closed when it returns."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.settimeout(0.05)
        state = Wire(host, listener.getsockname()[1])
        threads: list[threading.Thread] = []

        def serve(peer: socket.socket) -> None:
            with suppress(OSError), peer:
                peer.settimeout(10)
                end = tls.wrap_socket(peer, server_side=True) if tls else peer
                head = _head(end) if read_request else ""
                if head:
                    state.requests.append(head)
                answer(state, end, head)
            state.idle.set()

        def accept() -> None:
            while not state.stopped.is_set():
                with suppress(TimeoutError):
                    peer, _ = listener.accept()
                    state.connections += 1
                    threads.append(threading.Thread(target=serve, args=(peer,)))
                    threads[-1].start()

        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield state
        finally:
            state.stopped.set()
            for thread in threads:
                thread.join()


def _head(peer: socket.socket) -> str:
    head = b""
    while b"\r\n\r\n" not in head and (piece := peer.recv(65536)):
        head += piece
    return head.decode("latin-1")


def say(text: str | bytes) -> Callable[[Wire, socket.socket, str], None]:
    """An answer that is always the same."""
    data = text.encode("latin-1") if isinstance(text, str) else text

    def answer(state: Wire, peer: socket.socket, head: str) -> None:
        peer.sendall(data)

    return answer


def ok(body: str = "hello", more: str = "") -> str:
    return f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n{more}Content-Length: {len(body)}\r\n\r\n{body}"


def redirect(target: str, status: int = 302) -> str:
    return f"HTTP/1.1 {status} Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
