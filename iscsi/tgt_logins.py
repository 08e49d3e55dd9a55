"""Logins that have begun and not ended: the one way round a fence, closed here.

tgtd looks at the ACL in the first step of a login and at the account in the next; a session is listed only after the
last one. An initiator that stops in between (a machine that was suspended, a hostile one) is in no list, and when it
goes on after its ACL and account were revoked, tgtd lets it in, even into a later target that has the same number. So
after the lists are empty we count tgtd's TCP connections in the kernel: those from an address that has more
connections than sessions, for longer than a login takes, are shut down. Which of them is which tgtd does not tell;
a session that is cut off with them reconnects without an error. What this cannot see: a half login from an address that
at the same moment has a session, on another volume, whose connection is gone while its write is still in flight.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

Address = IPv4Address | IPv6Address
Sockets = dict[int, tuple[int, Address]]  # inode -> (descriptor in tgtd, peer)

_LIBC = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438
_TCP_ESTABLISHED = 1  # include/net/tcp_states.h


class _Closed(Exception):
    """The process closed this descriptor meanwhile, and its number may mean another socket now."""


def close_unfinished(
    pid: int, sessions: Callable[[], set[tuple[int, int, str]]], *, grace: float = 1.0, pause: float = 0.02
) -> list[str]:
    """Shut down connections of process `pid` whose login does not end within `grace` seconds.

    `sessions` lists (session, connection, address) of all sessions. Returns the addresses that still have such a
    connection: they could not be cut off (a kernel before 5.6, no right to trace tgtd), so the fence does not hold yet.
    """
    deadline = time.monotonic() + grace
    suspects = _unfinished(pid, sessions, None)
    while suspects and time.monotonic() < deadline:
        time.sleep(pause)
        suspects = _unfinished(pid, sessions, suspects)
    for inode, (descriptor, _) in suspects.items():
        with contextlib.suppress(OSError):
            _shut_down(pid, descriptor, inode)
    while suspects and time.monotonic() < deadline + grace:
        time.sleep(pause)
        suspects = _unfinished(pid, sessions, suspects)
    return sorted({str(address) for _, address in suspects.values()})


def _unfinished(pid: int, sessions: Callable[[], set[tuple[int, int, str]]], among: Sockets | None) -> Sockets:
    """Connections (of `among`) from addresses with more connections than sessions.

    Sessions are read before and after; only those in both have their connection in the count between.
    """
    if not _established(pid):
        return {}
    before = sessions()
    established = _established(pid)
    steady = Counter(_plain(address) for _, _, address in before & sessions())
    if among is not None:
        established = {inode: entry for inode, entry in established.items() if inode in among}
    count = Counter(address for _, address in established.values())
    return {inode: entry for inode, entry in established.items() if count[entry[1]] > steady[entry[1]]}


def _established(pid: int) -> Sockets:
    """Its TCP connections, asked of copies of its sockets, or where we may not copy them, of the kernel's tables.

    The tables cost milliseconds however few lines they have: the kernel walks every bucket of a large hash.
    """
    descriptors = _socket_descriptors(pid)
    try:
        return _by_copies(pid, descriptors)
    except OSError:
        return _by_tables(pid, descriptors)


def _by_copies(pid: int, descriptors: dict[int, int]) -> Sockets:
    found: Sockets = {}
    process = os.pidfd_open(pid)
    try:
        for inode, descriptor in descriptors.items():
            with contextlib.suppress(_Closed), _copied(process, descriptor, inode) as connection:
                if peer := _connected_to(connection):
                    found[inode] = descriptor, peer
    finally:
        os.close(process)
    return found


def _connected_to(connection: socket.socket) -> Address | None:
    """The peer of an established TCP connection; None for any other socket."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return None
    try:
        if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_ESTABLISHED:
            return None
        return _plain(connection.getpeername()[0])
    except OSError:  # it ended between the two
        return None


def _by_tables(pid: int, descriptors: dict[int, int]) -> Sockets:
    found: Sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            inode = int(fields[9])
            if int(fields[3], 16) == _TCP_ESTABLISHED and inode in descriptors:
                found[inode] = descriptors[inode], _peer(fields[2])
    return found


def _socket_descriptors(pid: int) -> dict[int, int]:
    """inode -> descriptor, of the sockets of a process."""
    found = {}
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            link = os.readlink(entry.path)
            if link.startswith("socket:["):
                found[int(link[8:-1])] = int(entry.name)
    return found


def _peer(field: str) -> Address:
    """The address in a line of /proc/net/tcp: 32-bit words in the machine's order, in hex."""
    words = bytes.fromhex(field.split(":")[0])
    step = -1 if sys.byteorder == "little" else 1
    raw = b"".join(words[i : i + 4][::step] for i in range(0, len(words), 4))
    return _plain(str(ip_address(raw)))


def _plain(text: str) -> Address:
    address = ip_address(text.strip("[]"))
    return getattr(address, "ipv4_mapped", None) or address


def _shut_down(pid: int, descriptor: int, inode: int) -> None:
    """Shut down another process' socket; it sees the end of the stream. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        with contextlib.suppress(_Closed), _copied(process, descriptor, inode) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(process)


@contextlib.contextmanager
def _copied(process: int, descriptor: int, inode: int) -> Iterator[socket.socket]:
    """Our own copy of another process' socket (pidfd_getfd(2)). Raises _Closed, OSError."""
    copy = _LIBC.syscall(_PIDFD_GETFD, process, descriptor, 0)
    if copy < 0:
        number = ctypes.get_errno()
        if number == errno.EBADF:
            raise _Closed
        raise OSError(number, os.strerror(number))
    with socket.socket(fileno=copy) as connection:
        if os.fstat(copy).st_ino != inode:
            raise _Closed
        yield connection
