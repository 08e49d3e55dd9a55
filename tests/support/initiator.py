"""Real initiators: Debian's iscsi-inq and iscsi-ls, qemu-io on iscsi://, and a bare one that speaks PDUs.

No secret is put into an argv: libiscsi's tools take it from the environment, qemu from a file of memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_OPERATIONAL = {
    "HeaderDigest": "None", "DataDigest": "None", "InitialR2T": "Yes", "ImmediateData": "Yes",
    "MaxRecvDataSegmentLength": "262144", "MaxBurstLength": "262144", "FirstBurstLength": "65536",
    "DefaultTime2Wait": "0", "DefaultTime2Retain": "0", "MaxOutstandingR2T": "1", "MaxConnections": "1",
    "ErrorRecoveryLevel": "0", "DataPDUInOrder": "Yes", "DataSequenceInOrder": "Yes",
}  # fmt: skip
_FAILURE = re.compile(r"^.*(?:failed|error|mismatch).*$", re.IGNORECASE | re.MULTILINE)


class InitiatorError(AssertionError):
    """An initiator was refused, or its I/O failed."""


class Initiator:
    """One initiator and its account at one target. `mutual` is (name, secret) it demands of the target."""

    def __init__(
        self,
        portal: str,
        iqn: str,
        initiator: str,
        username: str = "",
        password: str = "",
        mutual: tuple[str, str] | None = None,
        lun: int = 1,
    ) -> None:
        self.portal, self.iqn, self.initiator, self.lun = portal, iqn, initiator, lun
        self.username, self.password, self.mutual = username, password, mutual

    def login_error(self) -> str | None:
        """None when the login succeeds, else what the target answered, such as "… (513)"."""
        done = self._libiscsi("iscsi-inq", self._url)
        return None if done.returncode == 0 else done.stderr.strip()

    def inquiry(self, page: int | None = None) -> str:
        """What iscsi-inq prints of the standard inquiry or a VPD page."""
        pages = [] if page is None else ["-e", "1", "-c", str(page)]
        return _checked(self._libiscsi("iscsi-inq", *pages, self._url))

    def vpd(self, page: int) -> bytes:
        """A VPD page as it comes over the wire."""
        with self.bare() as bare:
            return bare.command(bytes([0x12, 1, page, 0, 255, 0]), 255)

    def ls(self) -> str:
        """What iscsi-ls -s prints: the targets this initiator may see, with their LUNs."""
        for _ in range(2):  # the first command after a LUN was added is answered with UNIT ATTENTION
            done = self._libiscsi("iscsi-ls", "-s", f"iscsi://{self.portal}")
            if done.returncode == 0:
                break
        return _checked(done)

    def write(self, offset: int, pattern: int, length: int) -> None:
        """Write `length` bytes of `pattern` and flush. Raises InitiatorError."""
        self.io(f"write -P {pattern} {offset} {length}", "flush")

    def read(self, offset: int, length: int, pattern: int) -> None:
        """Raises InitiatorError unless all bytes are `pattern`."""
        self.io(f"read -P {pattern} {offset} {length}", read_only=True)

    def discard(self, offset: int, length: int) -> None:
        self.io(f"discard {offset} {length}")

    def size(self) -> int:
        """The volume's bytes, as the initiator sees them."""
        with self.bare() as bare:
            capacity = bare.command(b"\x9e\x10" + bytes(8) + b"\0\0\0\x20\0\0", 32)  # READ CAPACITY (16)
        return (int.from_bytes(capacity[:8], "big") + 1) * int.from_bytes(capacity[8:12], "big")

    def io(self, *commands: str, read_only: bool = False) -> str:
        """Run qemu-io commands on the volume. Raises InitiatorError when one fails."""
        with self._qemu_io(read_only) as (argv, descriptor):
            words = [word for command in commands for word in ("-c", command)]
            done = subprocess.run(
                [*argv, *words], pass_fds=[descriptor], capture_output=True, text=True, timeout=60, check=False
            )
        if done.returncode or _FAILURE.search(done.stdout + done.stderr):
            raise InitiatorError(done.stdout + done.stderr)
        return done.stdout

    def bare(self, source: str = "", alias: str = "") -> Bare:
        """A session logged in by our own few lines of iSCSI, from the address `source`."""
        bare = Bare(self, source, alias)
        try:
            bare.authenticate()
            bare.enter_full_feature()
        except BaseException:
            bare.close()
            raise
        return bare

    @property
    def _url(self) -> str:
        return f"iscsi://{self.portal}/{self.iqn}/{self.lun}"

    def _libiscsi(self, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ)
        if self.username:
            environment |= {"LIBISCSI_CHAP_USERNAME": self.username, "LIBISCSI_CHAP_PASSWORD": self.password}
        if self.mutual:
            name, secret = self.mutual
            environment |= {"LIBISCSI_CHAP_TARGET_USERNAME": name, "LIBISCSI_CHAP_TARGET_PASSWORD": secret}
        argv = [tool, "-i", self.initiator, *arguments]
        return subprocess.run(argv, env=environment, capture_output=True, encoding="latin-1", timeout=30, check=False)

    @contextlib.contextmanager
    def _qemu_io(self, read_only: bool = False) -> Iterator[tuple[list[str], int]]:
        """argv of a qemu-io on this volume, and the descriptor it must inherit."""
        descriptor = os.memfd_create("secret")
        try:
            os.write(descriptor, self.password.encode())
            options = f"driver=iscsi,transport=tcp,portal={self.portal},target={self.iqn},lun={self.lun}"
            options += f",initiator-name={self.initiator}"
            argv = ["qemu-io", *(["-r"] if read_only else []), "--image-opts", options]
            if self.username:
                argv[1:1] = ["--object", f"secret,id=chap,file=/proc/self/fd/{descriptor}"]
                argv[-1] += f",user={self.username},password-secret=chap"
            yield argv, descriptor
        finally:
            os.close(descriptor)


class Writer:
    """A qemu-io that writes without end: rounds of 32 writes of 4 KiB in flight at once.

    Every round writes other bytes to `blocks` blocks from `offset` on, in turn. `errors` are all lines in which
    qemu-io reports one; `expected` maps offsets to the byte last acknowledged there.
    """

    DEPTH = 32
    BLOCK = 4096

    def __init__(self, initiator: Initiator, offset: int = 0, blocks: int = 512, depth: int = DEPTH) -> None:
        self._initiator, self._offset, self._blocks, self._depth = initiator, offset, blocks, depth
        self.errors: list[str] = []
        self.expected: dict[int, int] = {}
        self.rounds = 0
        self._stop = threading.Event()
        self._round = threading.Condition()
        with initiator._qemu_io() as (argv, descriptor):
            # unbuffered: qemu-io waits for its descriptor, and would not see lines that stdio has read ahead
            self.process = subprocess.Popen(
                ["stdbuf", "-i0", "-oL", *argv],
                pass_fds=[descriptor],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
            self.wait_rounds(1)  # it has read its secret by now

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_rounds(self, more: int, timeout: float = 60) -> None:
        """Wait until `more` rounds from now were acknowledged. Raises InitiatorError."""
        with self._round:
            goal = self.rounds + more
            self._round.wait_for(lambda: self.rounds >= goal or not self._thread.is_alive(), timeout)
            if self.rounds < goal:
                raise InitiatorError(f"round {self.rounds} of {goal}: {self.errors}")

    def stop(self, timeout: float = 60) -> list[str]:
        """Finish the round, end qemu-io, return the errors it ever reported."""
        self._stop.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.errors.append("the writer hangs")
        self.kill()
        return self.errors

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._write_round()
        except (OSError, ValueError, EOFError) as error:
            if not self._stop.is_set():
                self.errors.append(f"qemu-io ended: {error!r}")
        finally:
            with self._round:
                self._round.notify_all()

    def _write_round(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        pattern = self.rounds % 250 + 1
        numbers = [(self.rounds * self._depth + i) % self._blocks for i in range(self._depth)]
        offsets = [self._offset + number * self.BLOCK for number in numbers]
        self.process.stdin.writelines(f"aio_write -P {pattern} {offset} {self.BLOCK}\n" for offset in offsets)
        self.process.stdin.write("aio_flush\n")
        self.process.stdin.flush()
        failed = answered = 0
        while answered + failed < self._depth:
            line = self.process.stdout.readline()
            if not line:
                raise EOFError("end of output")
            if _FAILURE.search(line):
                self.errors.append(line.strip())
                failed += 1
            answered += "wrote " in line
        if failed:
            raise EOFError(f"{failed} of {self._depth} writes failed")  # which of them, qemu-io does not tell
        self.expected |= dict.fromkeys(offsets, pattern)
        with self._round:
            self.rounds += 1
            self._round.notify_all()


def lost(path: Path, expected: dict[int, int], block: int = Writer.BLOCK) -> list[int]:
    """The offsets at which the file does not hold what was acknowledged to a writer."""
    with path.open("rb") as file:
        return [at for at, byte in expected.items() if os.pread(file.fileno(), block, at) != bytes([byte]) * block]


class Bare:
    """A few lines of iSCSI (RFC 7143) of our own: what the tools do not show, and logins that stop half-way."""

    def __init__(self, who: Initiator, source: str = "", alias: str = "") -> None:
        self._who, self._alias, self._sequence, self._status = who, alias, 1, 0
        self._one_at_a_time = threading.Lock()
        host, _, port = who.portal.rpartition(":")
        self._isid = b"\x80" + os.urandom(3) + b"\0\0"
        self._socket = socket.create_connection((host.strip("[]"), int(port)), 30, (source, 0) if source else None)

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    @contextlib.contextmanager
    def attended(self) -> Iterator[Bare]:
        """A session that is used now and then: LIO pings it every 15 s, and ends it when it has no answer for 30 s."""
        leaving = threading.Event()

        def attend() -> None:
            with contextlib.suppress(InitiatorError, OSError):  # the next command will tell
                while not leaving.wait(1):
                    self.command(bytes(6), 0)

        thread = threading.Thread(target=attend, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            leaving.set()
            thread.join(60)

    def authenticate(self) -> None:
        """The security stage: names, CHAP. The target has checked the ACL and the account when it returns."""
        first = {"InitiatorName": self._who.initiator, "TargetName": self._who.iqn, "SessionType": "Normal"}
        alias = {"InitiatorAlias": self._alias} if self._alias else {}
        self._login(0x00, first | alias | {"AuthMethod": "CHAP"})
        asked = self._login(0x00, {"CHAP_A": "5"})
        challenge = asked["CHAP_C"]
        raw = bytes.fromhex(challenge[2:])
        secret = self._who.password.encode()
        response = hashlib.md5(bytes([int(asked["CHAP_I"])]) + secret + raw).hexdigest()
        self._login(0x81, {"CHAP_N": self._who.username, "CHAP_R": f"0x{response}"})

    def enter_full_feature(self) -> None:
        """The last step of the login: now it is a session. LIO wants each of its keys answered, tgt none."""
        self._login(0x87, _OPERATIONAL)

    def command(self, cdb: bytes, length: int, flags: int = 0xC1, sent: bytes = b"") -> bytes:
        """Send a command that reads at most `length` bytes; returns the data. Repeats after UNIT ATTENTION.

        `flags` say otherwise, truly or not; `sent` is data that goes with the command itself.
        """
        with self._one_at_a_time:
            return self._command(cdb, length, flags, sent)

    def _command(self, cdb: bytes, length: int, flags: int, sent: bytes) -> bytes:
        for _ in range(3):
            self._send(0x01, flags, struct.pack(">Q", self._who.lun << 48), length, cdb.ljust(16, b"\0"), sent)
            data = b""
            opcode, answered, status, payload = self._receive()
            while opcode == 0x25 and not answered & 1:
                data += payload
                opcode, answered, status, payload = self._receive()
            data += payload if opcode == 0x25 else b""
            if status == 0:
                return data
        raise InitiatorError(f"command {cdb.hex()}: status {status}")

    def _login(self, flags: int, keys: dict[str, str]) -> dict[str, str]:
        text = "".join(f"{key}={value}\0" for key, value in keys.items()).encode()
        header = struct.pack(">BBBBB3s6sHIHHII", 0x43, flags, 0, 0, 0, len(text).to_bytes(3, "big"),
                             self._isid, 0, 1, 0, 0, 1, self._status).ljust(48, b"\0")  # fmt: skip
        self._socket.sendall(header + text + bytes(-len(text) % 4))
        answer, payload = self._pdu()
        self._status = struct.unpack_from(">I", answer, 24)[0] + 1
        if answer[36] or answer[1] & 0x80 != flags & 0x80:
            raise InitiatorError(f"login refused ({answer[36] * 256 + answer[37]})")
        return dict(pair.split("=", 1) for pair in payload.decode().split("\0") if pair)

    def _send(self, opcode: int, flags: int, lun: bytes, length: int, cdb: bytes, sent: bytes) -> None:
        header = struct.pack(">BBHI8sIIII", opcode, flags, 0, len(sent), lun, self._sequence, length, self._sequence,
                             self._status)  # fmt: skip
        self._socket.sendall(header + cdb + sent + bytes(-len(sent) % 4))
        self._sequence += 1

    def _receive(self) -> tuple[int, int, int, bytes]:
        header, payload = self._pdu()
        while header[0] & 0x3F == 0x20:  # a ping of the target
            self._answer(header)
            header, payload = self._pdu()
        self._status = struct.unpack_from(">I", header, 24)[0] + 1
        return header[0] & 0x3F, header[1], header[3], payload

    def _answer(self, ping: bytes) -> None:
        """NOP-Out for NOP-In, if it wants one (RFC 7143 §11.19)."""
        if ping[20:24] != b"\xff" * 4:
            numbers = struct.pack(">II", self._sequence, self._status)
            self._socket.sendall(
                (b"\x40\x80" + bytes(6) + ping[8:16] + b"\xff" * 4 + ping[20:24] + numbers).ljust(48, b"\0")
            )

    def _pdu(self) -> tuple[bytes, bytes]:
        header = self._exactly(48)
        size = int.from_bytes(header[5:8], "big")
        payload = self._exactly(size + -size % 4)[:size]
        return header, payload

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise InitiatorError("the target closed the connection")
            data += part
        return data


def wait_until(condition: Callable[[], object], timeout: float = 20) -> None:
    """Poll until the condition is true. Raises AssertionError."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def _checked(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise InitiatorError(done.stderr)
    return done.stdout
