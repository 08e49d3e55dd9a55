"""tgtd's management socket, spoken directly: no process per call, and no secret in an argv.

One request per connection to a unix stream socket, structs in the machine's byte order (tgt's usr/tgtadm.h):

    request   mode u32 · op u32 · driver char[64] · len u32 · tid i32 · sid u64 · lun u64 · cid u32 · host u32 ·
              device type u32 · account direction u32 · pack u32 · force u32                           = 120 bytes
              then len - 120 bytes: "key=value[,key=value]", NUL at the end
    answer    err u32 · len u32                                                                        = 8 bytes
              then len - 8 bytes of text

tgtd asks the kernel who connects and serves its own user and group only. It reads until a key's end with `strstr` and
"," splits: what we put into a value is checked against that before it is sent.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Collection
from enum import IntEnum
from pathlib import Path

from iscsi.names import LUN
from iscsi.target import TargetRefused, TargetUnavailable

_REQUEST = struct.Struct("=II64sIiQQIIIIII")
_UCRED = struct.Struct("=iII")
_ANSWER = struct.Struct("=II")
_PAYLOAD_MAX = 8 * 1024  # MAX_MGT_BUFSIZE
_ANSWER_MAX = 256 * 1024 * 1024
ALL = -1


class Op(IntEnum):
    NEW, DELETE, SHOW, BIND, UNBIND, UPDATE = range(6)


class Mode(IntEnum):
    SYSTEM, TARGET, DEVICE, PORTAL, DRIVER, SESSION, CONNECTION, ACCOUNT = range(8)


class Code(IntEnum):
    """tgt's error numbers (usr/tgtadm_error.h)."""

    (OK, UNKNOWN, NO_MEMORY, NO_DRIVER, NO_TARGET, NO_LUN, NO_SESSION, NO_CONNECTION, NO_BINDING, TARGET_EXISTS,
     LUN_EXISTS, BINDING_EXISTS, ACL_EXISTS, NO_ACL, USER_EXISTS, NO_USER, TOO_MANY_USERS, INVALID_REQUEST,
     OUTGOING_EXISTS, TARGET_ACTIVE, LUN_ACTIVE, DRIVER_ACTIVE, UNSUPPORTED, UNKNOWN_PARAMETER,
     PREVENT_REMOVAL) = range(25)  # fmt: skip


class TgtIpc:
    """The verbs of one tgtd, reached at `directory`/`name`. Stateless, safe from many threads.

    Every call has `timeout` seconds in all. Raises TargetUnavailable when nothing answers, TargetRefused(code) when
    tgtd says no, except where a verb says which refusals mean "already so".
    """

    def __init__(self, directory: Path, name: str, timeout: float = 10.0) -> None:
        self.directory, self.name, self.timeout = directory, name, timeout

    def create_target(self, tid: int, iqn: str) -> None:
        self._call(Op.NEW, Mode.TARGET, tid=tid, payload=f"targetname={iqn}")

    def set_state(self, tid: int, state: str) -> None:
        """ "offline" refuses every login and command, "ready" is the usual state."""
        self._call(Op.UPDATE, Mode.TARGET, tid=tid, payload=f"state={state}")

    def delete_target(self, tid: int) -> None:
        """Never by force: tgtd refuses (TARGET_ACTIVE) while a session is listed, in one step with the deletion."""
        self._call(Op.DELETE, Mode.TARGET, tid=tid, accept={Code.NO_TARGET})

    def create_lun(self, tid: int, path: Path) -> None:
        self._call(Op.NEW, Mode.DEVICE, tid=tid, lun=LUN, payload=f"path={path},bstype=rdwr")

    def update_lun(self, tid: int, parameters: str) -> None:
        """`parameters` are "key=value" joined by commas; tgtd reports the outcome of the last one only."""
        self._call(Op.UPDATE, Mode.DEVICE, tid=tid, lun=LUN, payload=parameters)

    def delete_lun(self, tid: int) -> None:
        self._call(Op.DELETE, Mode.DEVICE, tid=tid, lun=LUN, accept={Code.NO_LUN})

    def create_account(self, user: str, password: str) -> None:
        self._call(Op.NEW, Mode.ACCOUNT, payload=f"user={user},password={password}", accept={Code.USER_EXISTS})

    def delete_account(self, user: str) -> None:
        self._call(Op.DELETE, Mode.ACCOUNT, payload=f"user={user}", accept={Code.NO_USER})

    def bind_account(self, tid: int, user: str, *, outgoing: bool = False) -> None:
        self._call(Op.BIND, Mode.ACCOUNT, tid=tid, outgoing=outgoing, payload=f"user={user}", accept={Code.USER_EXISTS})

    def unbind_account(self, tid: int, user: str, *, outgoing: bool = False) -> None:
        self._call(Op.UNBIND, Mode.ACCOUNT, tid=tid, outgoing=outgoing, payload=f"user={user}", accept={Code.NO_USER})

    def bind_initiator(self, tid: int, initiator: str) -> None:
        self._call(Op.BIND, Mode.TARGET, tid=tid, payload=f"initiator-name={initiator}", accept={Code.ACL_EXISTS})

    def unbind_initiator(self, tid: int, initiator: str) -> None:
        self._call(Op.UNBIND, Mode.TARGET, tid=tid, payload=f"initiator-name={initiator}", accept={Code.NO_ACL})

    def unbind_address(self, tid: int, address: str) -> None:
        self._call(Op.UNBIND, Mode.TARGET, tid=tid, payload=f"initiator-address={address}", accept={Code.NO_ACL})

    def close_connection(self, tid: int, session_id: int, connection_id: int) -> None:
        gone = {Code.NO_TARGET, Code.NO_SESSION, Code.NO_CONNECTION}
        self._call(Op.DELETE, Mode.CONNECTION, tid=tid, sid=session_id, cid=connection_id, accept=gone)

    def list_targets(self) -> str:
        """Numbers and names only: nothing in it comes from an initiator."""
        return self._call(Op.SHOW, Mode.DRIVER)

    def show_targets(self) -> str:
        return self._call(Op.SHOW, Mode.TARGET)

    def show_connections(self, tid: int) -> str:
        return self._call(Op.SHOW, Mode.CONNECTION, tid=tid, accept={Code.NO_TARGET})

    def show_portals(self) -> str:
        return self._call(Op.SHOW, Mode.PORTAL)

    def open_portal(self, portal: str) -> None:
        self._call(Op.NEW, Mode.PORTAL, payload=f"portal={portal}")

    def close_portal(self, portal: str) -> None:
        self._call(Op.DELETE, Mode.PORTAL, payload=f"portal={portal}")

    def answers(self) -> bool:
        """Whether a tgtd answers at the socket."""
        try:
            self._call(Op.SHOW, Mode.SYSTEM)
        except TargetUnavailable:
            return False
        return True

    def shut_down(self) -> None:
        """End tgtd; it refuses while it has targets."""
        self._call(Op.DELETE, Mode.SYSTEM)

    def connect(self) -> socket.socket:
        """A connection to the socket, whatever the length of its path. Raises TargetUnavailable.

        A unix address holds 108 bytes, so the directory is named by a descriptor: /proc/self/fd/N/name.
        """
        try:
            directory = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise TargetUnavailable(f"no tgtd at {self.directory}: {error.strerror}") from error
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout)
            connection.connect(f"/proc/self/fd/{directory}/{self.name}")
        except OSError as error:
            connection.close()
            raise TargetUnavailable(f"tgtd does not answer at {self.directory / self.name}: {error}") from error
        finally:
            os.close(directory)
        return connection

    def peer_pid(self) -> int:
        """The process behind the socket, as the kernel knows it (SO_PEERCRED, unix(7)). Raises TargetUnavailable.

        It is asked something as well: when a connection ends before its request has come, tgtd looks at whatever errno
        is left from another call, and may go on reading the end of that stream for ever, at the cost of a core.
        """
        found: list[int] = []
        self._exchange(_packed(Op.SHOW, Mode.PORTAL), lambda connection: found.append(_pid_behind(connection)))
        return found[0]

    def _call(
        self, op: Op, mode: Mode, *, tid: int = ALL, sid: int = 0, lun: int = 0, cid: int = 0,
        outgoing: bool = False, payload: str = "", accept: Collection[Code] = (),
    ) -> str:  # fmt: skip
        body = payload.encode() + b"\0" if payload else b""
        if len(body) > _PAYLOAD_MAX:
            raise TargetRefused(_label(op, mode), 0, f"{len(body)} bytes are too long for tgtd")
        request = _packed(op, mode, tid=tid, sid=sid, lun=lun, cid=cid, outgoing=outgoing, body=body)
        code, text = self._exchange(request)
        if code and code not in accept:
            raise TargetRefused(_label(op, mode), code, _words(code))
        return text

    def _exchange(self, request: bytes, look: Callable[[socket.socket], None] | None = None) -> tuple[int, str]:
        """Code and text of the answer. `look` is shown the connection while it stands."""
        deadline = time.monotonic() + self.timeout
        with self.connect() as connection:
            try:
                connection.sendall(request)
                if look is not None:
                    look(connection)
                code, size = _ANSWER.unpack(_receive(connection, _ANSWER.size, deadline))
                if not _ANSWER.size <= size <= _ANSWER_MAX:
                    raise TargetUnavailable(f"not tgtd: an answer of {size} bytes at {self.directory / self.name}")
                text = _receive(connection, size - _ANSWER.size, deadline)
            except OSError as error:
                raise TargetUnavailable(f"tgtd at {self.directory / self.name} broke off: {error}") from error
        return code, text.rstrip(b"\0").decode(errors="replace")


def _packed(
    op: Op, mode: Mode, *, tid: int = ALL, sid: int = 0, lun: int = 0, cid: int = 0, outgoing: bool = False,
    body: bytes = b"",
) -> bytes:  # fmt: skip
    size = _REQUEST.size + len(body)
    return _REQUEST.pack(mode, op, b"iscsi", size, tid, sid, lun, cid, 0, 0, int(outgoing), 0, 0) + body


def _pid_behind(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[0])


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly `size` bytes before `deadline`, or an OSError."""
    parts: list[bytes] = []
    while size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise ConnectionResetError("closed in the middle of an answer")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _label(op: Op, mode: Mode) -> str:
    return f"tgt {op.name.lower()} {mode.name.lower()}"


def _words(code: int) -> str:
    return Code(code).name.lower().replace("_", " ") if code < len(Code) else f"error {code}"
