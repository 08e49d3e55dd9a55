"""The kernel's own initiator, through iscsiadm and an iscsid of ours: for the test kernel, as root.

Each initiator name is an iscsiadm interface of its own, so one kernel plays several nodes. No secret is put into an
argv: it is written into the node's record, a file of iscsiadm's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.initiator import wait_until

_ETC = Path("/etc/iscsi")
_SESSIONS = Path("/sys/class/iscsi_session")
#: The tag of the portal group; both of our targets have but one.
_GROUP = 1
#: A refusal is told at once, and a session that lost its target gives up its I/O after a few seconds.
_RECORD = {
    "node.session.initial_login_retry_max": "1",
    "node.session.timeo.replacement_timeout": "5",
    "node.conn[0].timeo.login_timeout": "10",
    "node.conn[0].timeo.logout_timeout": "10",
    "node.startup": "manual",
}


class IscsiadmFailed(AssertionError):
    """iscsiadm ended with an exit code other than 0: `code`, see iscsiadm(8), such as 24 for a refused login."""

    AUTHENTICATION = 24

    def __init__(self, argv: list[str], code: int, said: str) -> None:
        super().__init__(f"{' '.join(argv)}: exit code {code}: {said.strip()}")
        self.code = code


@contextmanager
def running_iscsid() -> Iterator[None]:
    """An iscsid, with the directories and the name it wants; sessions still there at the end are logged out."""
    for directory in (Path("/run/lock/iscsi"), _ETC / "nodes", _ETC / "send_targets", _ETC / "ifaces"):
        directory.mkdir(parents=True, exist_ok=True)
    (_ETC / "initiatorname.iscsi").write_text("InitiatorName=iqn.2004-10.org.example:nobody\n")
    with Path("/run/iscsid.log").open("ab") as log:
        process = subprocess.Popen(["iscsid", "--foreground", "--no-pid-file"], stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log)  # fmt: skip
    try:
        wait_until(lambda: _answers(process))
        yield
    finally:
        subprocess.run(["iscsiadm", "-m", "node", "--logoutall=all"], capture_output=True, timeout=60, check=False)
        process.send_signal(signal.SIGKILL)
        process.wait()


class KernelInitiator:
    """One initiator name and its account at one target, logged in by the kernel. `mutual` is what it demands back."""

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
        self._interface = "i" + hashlib.sha256(initiator.encode()).hexdigest()[:12]

    def __enter__(self) -> KernelInitiator:
        self.login()
        return self

    def __exit__(self, *_: object) -> None:
        self.logout()

    def login(self) -> Path:
        """Log in, and wait for the device. Raises IscsiadmFailed when the target refuses."""
        self._write_record()
        self._node("--login")
        wait_until(self._opens)
        return self.device

    def logout(self) -> None:
        """End the session and forget the target; nothing happens when there is none."""
        if self.sessions():
            self._node("--logout")
        if self._record_file() is not None:
            self._node("-o", "delete")

    def rescan(self) -> None:
        """Look at the target again: new LUNs, new sizes."""
        for session in self.sessions():
            _iscsiadm("-m", "session", "-r", session.name.removeprefix("session"), "--rescan")

    def sessions(self) -> list[Path]:
        """Its sessions at this target in sysfs, whatever their state."""
        return [
            session
            for session in sorted(_SESSIONS.glob("session*"))
            if _attribute(session / "targetname") == self.iqn
            and _attribute(session / "initiatorname") == self.initiator
        ]

    @property
    def state(self) -> str:
        """LOGGED_IN, FAILED or FREE, as the kernel has it; empty when there is no session."""
        return next((_attribute(session / "state") for session in self.sessions()), "")

    @property
    def device(self) -> Path:
        """The block device, such as /dev/sda. Raises AssertionError unless there is exactly one."""
        found = self._devices()
        assert len(found) == 1, f"{self.iqn} has {len(found)} devices with LUN {self.lun}"
        return Path("/dev") / found[0].name

    @property
    def size(self) -> int:
        """The device's bytes, as the kernel has them since login or rescan."""
        return int(_attribute(self._sys / "size")) * 512

    @property
    def read_only(self) -> bool:
        return _attribute(self._sys / "ro") == "1"

    @property
    def serial(self) -> str:
        """The unit serial number, VPD page 0x80."""
        return self.vpd(0x80)[4:].decode().strip()

    @property
    def wwid(self) -> str:
        """What /dev/disk/by-id/wwn-… and multipath go by, such as naa.6001405…, of VPD page 0x83."""
        return _attribute(self._sys / "device/wwid")

    def vpd(self, page: int) -> bytes:
        """A VPD page as the kernel read it."""
        return (self._sys / f"device/vpd_pg{page:02x}").read_bytes()

    @property
    def by_id(self) -> str:
        """The name that udev would give it in /dev/disk/by-id, without `scsi-`: see scsi_id(8)."""
        scsi_id = shutil.which("scsi_id", path=os.pathsep.join(["/lib/udev", "/usr/lib/udev"]))
        assert scsi_id, "scsi_id is missing: install udev"
        done = subprocess.run([scsi_id, "-g", "-u", "-d", self.device], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    @property
    def _sys(self) -> Path:
        return Path("/sys/block") / self.device.name

    def _devices(self) -> list[Path]:
        return [found for session in self.sessions() for found in session.glob(f"device/target*/*:{self.lun}/block/*")]

    def _opens(self) -> bool:
        """The device is listed some time before it can be opened."""
        if not self._devices():
            return False
        try:
            os.close(os.open(self.device, os.O_RDONLY))
        except OSError:
            return False
        return True

    def _write_record(self) -> None:
        _iscsiadm("-m", "iface", "-I", self._interface, "-o", "new", may_fail=True)  # it may be there
        for name, value in {"iface.transport_name": "tcp", "iface.initiatorname": self.initiator}.items():
            _iscsiadm("-m", "iface", "-I", self._interface, "-o", "update", "-n", name, "-v", value)
        self._node("-o", "new")
        record = self._record_file()
        assert record is not None
        settings = _RECORD | self._authentication()
        kept = [line for line in record.read_text().splitlines() if line.partition(" = ")[0] not in settings]
        added = [f"{name} = {value}" for name, value in settings.items()]
        end = kept.index("# END RECORD")
        record.write_text("\n".join([*kept[:end], *added, *kept[end:], ""]))

    def _authentication(self) -> dict[str, str]:
        if not self.username:
            return {"node.session.auth.authmethod": "None"}
        both = {"username": self.username, "password": self.password}
        if self.mutual:
            both |= {"username_in": self.mutual[0], "password_in": self.mutual[1]}
        return {"node.session.auth.authmethod": "CHAP"} | {f"node.session.auth.{key}": both[key] for key in both}

    def _record_file(self) -> Path | None:
        host, _, port = self.portal.rpartition(":")
        file = _ETC / "nodes" / self.iqn / f"{host.strip('[]')},{port},{_GROUP}" / self._interface
        return file if file.exists() else None

    def _node(self, *arguments: str) -> None:
        _iscsiadm("-m", "node", "-T", self.iqn, "-p", f"{self.portal},{_GROUP}", "-I", self._interface, *arguments)


def _answers(process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, Path("/run/iscsid.log").read_text(errors="replace")
    # 21: there are no sessions; anything else says that nobody answered
    return subprocess.run(["iscsiadm", "-m", "session"], capture_output=True, check=False).returncode in (0, 21)


def _iscsiadm(*arguments: str, may_fail: bool = False) -> str:
    argv = ["iscsiadm", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode and not may_fail:
        raise IscsiadmFailed(argv, done.returncode, done.stderr or done.stdout)
    return done.stdout


def _attribute(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # gone meanwhile
        return ""
