"""`make demo`: the life of a volume, walked with the commands a user types and a real iSCSI initiator.

    temporary directory/
      home/             all the service's state
      *.token *.json    what users and machines keep
      *.env *.secret    a connection's user name and password, as the initiators' tools want them

Everything listens on loopback, on ports nobody had. The first step that fails ends the walk, since the later ones stand
on it. Whatever happens, Ctrl-C included, no process and no file is left; the last line counts, the exit code agrees.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

HOST_A = "iqn.2004-10.org.example:host-a"
HOST_B = "iqn.2004-10.org.example:host-b"
#: Every process of the demo has this in its environment; by it the last ones are found.
MARK = "STRATUS_DEMO"
_READY = re.compile(r"^(stratus-storage: ready: .*)\n", re.MULTILINE)
_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


class StepFailed(Exception):
    """A command did something else than it should, or a result is not what it should be."""


class Shell:
    """Runs commands in `directory` and shows them and their answers, as a terminal would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        kept = {key: value for key, value in os.environ.items() if not key.startswith("STRATUS_")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        places = dict.fromkeys([MARK, "TMPDIR", "XDG_CONFIG_HOME"], str(directory))
        self.environment = {**kept, **places, "PATH": path}

    def export(self, **variables: str) -> None:
        self.environment.update(variables)
        print("  $ export", *(f"{name}={shlex.quote(value)}" for name, value in variables.items()))

    def run(self, *argv: str, status: int | None = 0, into: str = "", given: dict[str, str] | None = None,
            typed: str = "") -> str:  # fmt: skip
        """What the command prints. Raises StepFailed.

        `status` is the exit code it must have, None any but 0; `into` a file for its output; `given` are more
        variables, and `typed` is how they are shown.
        """
        shown = " ".join(filter(None, [typed, shlex.join(argv), f"> {into}" if into else ""]))
        print(f"  $ {shown}", flush=True)
        done = self._run(argv, {**self.environment, **(given or {})})
        for line in (done.stderr + ("" if into else done.stdout)).splitlines():
            print(f"    {line}")
        if done.returncode != status if status is not None else done.returncode == 0:
            wanted = "another than 0" if status is None else status
            raise StepFailed(f"{argv[0]} ended with exit code {done.returncode}, expected {wanted}")
        if into:
            self.keep(into, done.stdout)
        return done.stdout

    def _run(self, argv: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        tool = shutil.which(argv[0], path=environment["PATH"])
        if tool is None:
            raise StepFailed(f"{argv[0]} is not on this machine")
        try:
            return subprocess.run(
                [tool, *argv[1:]],
                env=environment,
                cwd=self.directory,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=120,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{argv[0]} did not end within 120 s") from None

    def keep(self, name: str, text: str) -> None:
        """A file that nobody else may read."""
        with open(os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)


class Service:
    """`stratus-storage serve` on loopback."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._listen, portal = (f"127.0.0.1:{port}" for port in _free_ports(2))
        self.endpoint = f"http://{self._listen}"
        self._argv = ["stratus-storage", "serve", "--home", "home", "--listen", self._listen, "--portal", portal]
        self._log = shell.directory / "serve.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it says that it is ready. Raises StepFailed."""
        direct = {"STRATUS_ATTACHMENTS__DIRECT": "true"}
        print("  $ STRATUS_ATTACHMENTS__DIRECT=true", shlex.join(self._argv), "&", flush=True)
        # In a session of its own: Ctrl-C is for the demo, which then ends it in order.
        with self._log.open("ab") as log:
            said_before = log.tell()
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *self._argv], env={**self._shell.environment, **direct},
                cwd=self._shell.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        print(f"    {self._ready_line(self._process, said_before)}")

    def _ready_line(self, process: subprocess.Popen[bytes], said_before: int) -> str:
        """What the service says when it is ready; `said_before` is the size of the log of its earlier lives."""
        deadline = time.monotonic() + 60
        while not (found := _READY.search(self._log.read_bytes()[said_before:].decode(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise StepFailed(f"the service does not come up:\n{self.log()}")
            time.sleep(0.05)
        return found[1]

    def stop(self) -> None:
        """SIGTERM, and wait. Raises StepFailed unless it ends well and leaves no process."""
        if self._process is None:
            return
        print(f"  $ kill -TERM {self._process.pid}    # the service", flush=True)
        self._process.terminate()
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            raise StepFailed(f"the service does not end:\n{self.log()}") from None
        left = survivors(self._shell.directory)
        if code or left:
            raise StepFailed(f"the service ended with {code}, and {left} still run:\n{self.log()}")
        self._process = None

    def kill_all(self) -> None:
        """SIGKILL for everything at once, as a power cut would."""
        victims = survivors(self._shell.directory)
        print("  $ kill -KILL", *victims, "   # the service, its workers, the target", flush=True)
        end(self._shell.directory)
        if self._process is not None:
            self._process.wait()

    def log(self) -> str:
        text = self._log.read_text(errors="replace")
        return "\n".join(f"    {line}" for line in text.splitlines()[-20:])


class Machine:
    """An initiator: qemu-io and libiscsi's tools, with the connection in NAME.json. No secret is in an argv."""

    def __init__(self, shell: Shell, name: str, iqn: str) -> None:
        self._shell, self._name, self._iqn = shell, name, iqn

    def attach(self, volume: str, *more: str) -> None:
        file = f"{self._name}.json"
        self._shell.run("stratus-attach-volume", "--initiator", self._iqn, "--connection-file", file, *more, volume)
        auth = self._connection["auth"]
        self._shell.keep(f"{self._name}.secret", auth["password"])
        names = {"LIBISCSI_CHAP_USERNAME": auth["username"], "LIBISCSI_CHAP_PASSWORD": auth["password"]}
        self._shell.keep(f"{self._name}.env", "".join(f"export {key}={value}\n" for key, value in names.items()))
        print(f"    # user name and password out of {file} are in {self._name}.env and .secret, for the tools below")

    @property
    def _connection(self) -> dict[str, dict[str, str]]:
        loaded: dict[str, dict[str, str]] = json.loads((self._shell.directory / f"{self._name}.json").read_text())
        return loaded

    def tool(self, *argv: str, status: int | None = 0) -> str:
        """One of libiscsi's tools on the volume."""
        found, auth = self._connection, self._connection["auth"]
        given = {"LIBISCSI_CHAP_USERNAME": auth["username"], "LIBISCSI_CHAP_PASSWORD": auth["password"]}
        url = f"iscsi://{found['portal']}/{found['target']}/{found['lun']}"
        typed = f". ./{self._name}.env;"
        return self._shell.run(argv[0], "-i", self._iqn, *argv[1:], url, status=status, given=given, typed=typed)

    def io(self, *commands: str, read_only: bool = False) -> None:
        """qemu-io commands on the volume. Raises StepFailed when a pattern is not what it should be."""
        found = self._connection
        place = f"driver=iscsi,transport=tcp,portal={found['portal']},target={found['target']},lun={found['lun']}"
        place += f",initiator-name={self._iqn},user={found['auth']['username']},password-secret=chap"
        words = [word for command in commands for word in ("-c", command)]
        secret = f"secret,id=chap,file={self._name}.secret"
        mode = ["-r"] if read_only else []
        answer = self._shell.run("qemu-io", *mode, "--object", secret, "--image-opts", place, *words)
        if re.search(r"failed|error|mismatch", answer, re.IGNORECASE):
            raise StepFailed("the data on the volume is not what was written")

    def write(self, pattern: str) -> None:
        self.io(f"write -P {pattern} 0 64M", "flush")

    def verify(self, pattern: str) -> None:
        self.io(f"read -P {pattern} 0 64M", read_only=True)


class Walk:
    """The steps, in order: each is a title and what happens."""

    def __init__(self, shell: Shell, service: Service) -> None:
        self.shell, self.service = shell, service
        self.a, self.b = Machine(shell, "host-a", HOST_A), Machine(shell, "host-b", HOST_B)
        self.volume = self.snapshot = self.copy = ""

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            ("Start the service; what it cannot do on this host, its doctor says", self.start),
            ("Two users, each with a token", self.users),
            ("Create a volume of 1 GiB", self.create),
            ("Attach it to host-a over iSCSI", lambda: self.a.attach(self.volume)),
            ("Log in from host-a with CHAP, and write", self.write),
            ("While host-a has it, nobody else gets it", self.refuse_second),
            ("Detach it: host-a is fenced off", self.detach),
            ("The old connection opens nothing any more", lambda: _drop(self.a.tool("iscsi-inq", status=None))),
            ("Attach it to host-b: the data is there", self.find_again),
            ("Grow it while it is attached", self.grow),
            ("Restart the service; host-b's connection still stands", self.restart),
            ("Kill every process of the service; start it: nothing is lost", self.power_cut),
            ("Keep a snapshot, and spoil the data", self.take_snapshot),
            ("Revert to the snapshot: the data is back", self.revert),
            ("Clone the volume; the clone has the data", self.clone),
            ("Share the volume with a group: bob may read it, not write", self.share),
            ("Who did what: the chain of events holds", self.verify_events),
            ("Delete everything", self.delete),
            ("Stop the service: no process and no volume is left", self.stop),
        ]

    def start(self) -> None:
        self.service.start()
        self.shell.run("stratus-storage", "doctor", "--home", "home")

    def users(self) -> None:
        self.shell.export(STRATUS_HOME="home", STRATUS_ENDPOINT=self.service.endpoint)
        for name in ("alice", "bob"):
            self.shell.run("stratus-storage", "user", "add", name)
            self.shell.run("stratus-storage", "token", "create", name, into=f"{name}.token")
        self.shell.export(STRATUS_TOKEN_FILE="alice.token")

    def create(self) -> None:
        self.volume = _id_in(self.shell.run("stratus-create-volume", "-s", "1", "-t", "data"))

    def write(self) -> None:
        self.a.tool("iscsi-inq")
        self.a.write("0x5a")

    def refuse_second(self) -> None:
        self.shell.run("stratus-attach-volume", "--initiator", HOST_B, self.volume, status=4)

    def detach(self) -> None:
        self.shell.run("stratus-detach-volume", self.volume)
        self.shell.run("stratus-describe-volumes")

    def find_again(self) -> None:
        self.b.attach(self.volume)
        self.b.verify("0x5a")

    def grow(self) -> None:
        self.shell.run("stratus-update-volume", "-s", "1.5", self.volume)
        seen = self.b.tool("iscsi-readcapacity16")
        if str(3 << 29) not in seen:
            raise StepFailed(f"host-b does not see {3 << 29} bytes")

    def restart(self) -> None:
        self.service.stop()
        self.service.start()
        self.b.verify("0x5a")

    def power_cut(self) -> None:
        self.service.kill_all()
        self.service.start()
        self.b.verify("0x5a")

    def take_snapshot(self) -> None:
        self.shell.run("stratus-detach-volume", self.volume)
        self.snapshot = _id_in(self.shell.run("stratus-create-snapshot", "-t", "before", self.volume))
        self.b.attach(self.volume)
        self.b.write("0xee")
        self.shell.run("stratus-detach-volume", self.volume)

    def revert(self) -> None:
        self.shell.run("stratus-revert-volume", self.volume, "--snapshot", self.snapshot)
        self._verify(self.volume)

    def clone(self) -> None:
        self.copy = _id_in(self.shell.run("stratus-create-volume", "--volume", self.volume, "-t", "copy"))
        self._verify(self.copy)

    def _verify(self, volume: str) -> None:
        self.a.attach(volume, "--mode", "ro")
        self.a.verify("0x5a")
        self.shell.run("stratus-detach-volume", volume)

    def share(self) -> None:
        self.shell.run("stratus-storage", "group", "set", "lab", "alice", "bob")
        self.shell.run("stratus-share-volume", self.volume, "--group", "lab")
        if self.volume not in self._as_bob("stratus-describe-volumes"):
            raise StepFailed("bob does not see the volume")
        self._as_bob("stratus-attach-volume", "--initiator", HOST_B, self.volume, status=5)

    def _as_bob(self, *argv: str, status: int = 0) -> str:
        bob = {"STRATUS_TOKEN_FILE": "bob.token"}
        return self.shell.run(*argv, status=status, given=bob, typed="STRATUS_TOKEN_FILE=bob.token")

    def verify_events(self) -> None:
        self.shell.run("stratus-storage", "verify-events")

    def delete(self) -> None:
        self.shell.run("stratus-delete-snapshot", self.snapshot)
        self.shell.run("stratus-delete-volume", self.copy, self.volume)
        if _UUID.search(self.shell.run("stratus-describe-volumes")):
            raise StepFailed("there is still a volume")

    def stop(self) -> None:
        self.service.stop()
        if left := [str(path) for path in (self.shell.directory / "home/pool").rglob("*.raw")]:
            raise StepFailed(f"bytes are left: {left}")


def _drop(_: str) -> None:
    """For a step that is done with a command's answer."""


def _id_in(table: str) -> str:
    found = _UUID.search(table)
    if found is None:
        raise StepFailed("the answer names no id")
    return found[0]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def survivors(directory: Path) -> list[int]:
    """Living processes that were started for the demo in `directory`; zombies are dead."""
    return [pid for pid in _processes() if pid != os.getpid() and _is_marked(pid, f"{MARK}={directory}".encode())]


def _processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _is_marked(pid: int, mark: bytes) -> bool:
    with contextlib.suppress(OSError):
        # A zombie's environment reads as empty.
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def end(directory: Path) -> None:
    """SIGKILL until nothing of the demo lives."""
    while pids := survivors(directory):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def walk(shell: Shell) -> tuple[int, int]:
    """How many steps were made, and how many of them failed."""
    service = Service(shell)
    steps = Walk(shell, service).steps()
    for number, (title, act) in enumerate(steps, start=1):
        print(f"\n{number}. {title}", flush=True)
        try:
            act()
        except (StepFailed, OSError) as error:
            print(f"  FAILED: {error}\n\nThe {len(steps) - number} steps after this one need it and are left out.")
            return number, 1
    return len(steps), 0


def _interrupted(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    directory = Path(tempfile.mkdtemp(prefix="stratus-demo-"))
    try:
        made, failed = walk(Shell(directory))
    except KeyboardInterrupt as interrupt:
        print(f"\ndemo: interrupted by {interrupt}")
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        end(directory)
        shutil.rmtree(directory)
    print(f"\ndemo: {made} steps, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
