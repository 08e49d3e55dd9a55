"""Where code reads bytes of strangers: no network, no privileges, no files but those bound in, and an end.

    with sandbox.popen(["qemu-img", …], read={"/image": path}, limits=Limits(…), stdin=…, stdout=…) as process: …

Inside there are /usr (read-only), /dev with its harmless nodes, an empty /tmp of 1 MiB, and what the caller names;
nothing of our environment, and no descriptor but the first three. prlimit(1) sets the bounds, bwrap(1) the walls.

A plain user needs unprivileged user namespaces. Root does not stay root: a first bwrap builds the view (only root
reaches files below directories like its own home), setpriv(1) drops to `user`, and a second bwrap shuts that user in a
user namespace of its own, where no further one can be made and processes are counted apart from all others.
"""

from __future__ import annotations

import os
import pwd
import selectors
import signal
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO
from uuid import uuid4

from blockdev.command import CommandFailed, CommandMissing, Output, tool
from imagecache import staging
from imagecache.errors import SandboxFailed

#: A tool that says more than this on stdout and stderr together is ended by `run`.
MOST_OUTPUT = 16 << 20

_VIEW = (
    *("--die-with-parent", "--new-session", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
    *("--clearenv", "--setenv", "PATH", "/usr/bin:/usr/sbin", "--setenv", "LC_ALL", "C", "--ro-bind", "/usr", "/usr"),
    *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin"),
    *("--dev", "/dev", "--perms", "1777", "--size", str(1 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"),
)
_CAGE = ("--die-with-parent", "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL")
#: The second bwrap needs a /proc to write its maps to; what it starts needs none.
_AGAIN = ("--dev-bind", "/", "/", "--tmpfs", "/proc", "--remount-ro", "/proc", "--chdir", "/tmp")
#: A service may have an ambient capability, for its port say: bwrap refuses to begin with one that is not root's.
_NO_CAPABILITIES = ("--inh-caps=-all", "--ambient-caps=-all", "--")
#: Only /tmp has a bound of its own: whatever else is a tmpfs could be filled with all the memory of the host.
_SHUT = ("--remount-ro", "/", "--remount-ro", "/dev")

#: Nodes for devices, a stage (staging.py) for each process. Elsewhere than in /dev they may not work: nodev.
NODES = Path("/dev/stratus-sandbox")


@dataclass(frozen=True)
class Limits:
    """Bounds for each process in a sandbox: `memory` (address space) and `file_size` (of any file it writes) in bytes,
    `cpu` in seconds, `open_files`; `processes` is for all of them together, threads and bwrap's own one included.
    """

    memory: int = 1 << 30
    cpu: int = 30
    file_size: int = 0
    processes: int = 16
    open_files: int = 64


class Process(subprocess.Popen[bytes]):
    """A sandboxed process. Leaving its `with` block kills whatever of it is left, reaps it, closes the pipes, and takes
    back what it was `given`."""

    given: ExitStack

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.given:
            self.kill()  # bwrap's death is the death of everything in it; nothing happens if it has ended
            super().__exit__(kind, error, trace)


class Sandbox:
    """Makes sandboxes. `user` is whom root drops to, best one that nothing else runs as; a plain user stays who it is.

    Files to read must be readable by that user, in themselves: the directories above them need not be. Files to write
    are lent: theirs while the process runs, then again whose they were; if we are killed meanwhile they stay that
    user's, half written, for the caller to make anew. Block devices may be given like files.
    """

    def __init__(self, user: str = "nobody") -> None:
        self.user = user

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float,
        read: Mapping[str, Path] | None = None,
        write: Mapping[str, Path] | None = None,
        limits: Limits | None = None,
    ) -> Output:
        """Run a tool to its end, with /dev/null as stdin, for at most `timeout` seconds, and return what it wrote.

        `read` and `write` map paths inside to files or directories outside. Raises CommandFailed when the tool says
        that it failed; SandboxFailed when it was killed, did not end in time, said too much, or could not be started.
        """
        limits = limits or Limits()
        with self.popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            read=read, write=write, limits=limits,
        ) as process:  # fmt: skip
            said = _all_output(process, timeout)
        check(argv, process.returncode, said)
        return said

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[bytes],
        stdout: int | IO[bytes],
        stderr: int | IO[bytes] = subprocess.DEVNULL,
        read: Mapping[str, Path] | None = None,
        write: Mapping[str, Path] | None = None,
        limits: Limits | None = None,
    ) -> Process:
        """Start a tool, to be used in a `with`; its wall clock is the caller's business.

        It dies with the thread that started it, even one that was SIGKILLed (PR_SET_PDEATHSIG). `check` turns its exit
        code into an error. Raises SandboxFailed when it cannot be started.
        """
        with ExitStack() as given:
            try:
                read, write = self._own_nodes(read or {}, write or {}, given)
                command = self._command(argv, read, write, limits or Limits())
                self._lend(write.values(), given)
                process = Process(command, stdin=stdin, stdout=stdout, stderr=stderr, env={}, process_group=0)
            except (CommandMissing, OSError) as error:
                raise SandboxFailed(f"the sandbox cannot be made: {error}") from error
            process.given = given.pop_all()
        return process

    def sweep(self) -> None:
        """Remove the nodes that killed processes of ours left. Raises OSError."""
        if os.geteuid() == 0 and NODES.exists():
            staging.remove_leftovers(NODES)

    def check(self) -> None:
        """Make a sandbox. Raises SandboxFailed with the reason why it cannot be made."""
        try:
            self.run(["true"], timeout=10)
        except CommandFailed as error:
            raise SandboxFailed(f"the sandbox cannot be made: {error}") from error

    def _command(
        self, argv: Sequence[str], read: Mapping[str, Path], write: Mapping[str, Path], limits: Limits
    ) -> list[str]:
        bounds = [
            *(tool("prlimit"), "--core=0", f"--as={limits.memory}", f"--cpu={limits.cpu}"),
            *(f"--fsize={limits.file_size}", f"--nofile={limits.open_files}", "--"),
        ]
        # Only inside the new user namespace: outside, all that the user runs anywhere would count.
        tail = ["--", "prlimit", f"--nproc={limits.processes}", "--", *argv]
        view = [tool("bwrap"), *_VIEW, *_bound("--ro-bind", read), *_bound("--bind", write)]
        if os.geteuid() != 0:
            return [*bounds, tool("setpriv"), *_NO_CAPABILITIES, *view, *_SHUT, *_CAGE, *tail]
        uid, gid = self._account()
        drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        return [*bounds, *view, "--proc", "/proc", *_SHUT, "--", *drop, "--", "bwrap", *_CAGE, *_AGAIN, *tail]

    def _own_nodes(
        self, read: Mapping[str, Path], write: Mapping[str, Path], given: ExitStack
    ) -> tuple[Mapping[str, Path], Mapping[str, Path]]:
        """Block devices replaced by nodes that are the sandbox's user's, in a directory that only root can enter. Who
        owns the device's own node is udev's business, and a node of ours can be for reading only."""
        if os.geteuid() != 0 or not any(path.is_block_device() for path in (*read.values(), *write.values())):
            return read, write
        NODES.mkdir(mode=0o700, exist_ok=True)
        self.sweep()
        home = given.enter_context(staging.made(NODES, uuid4())).path

        def own(path: Path, mode: int) -> Path:
            if not path.is_block_device():
                return path
            node = home / str(len(os.listdir(home)))
            os.mknod(node, stat.S_IFBLK | mode, path.stat().st_rdev)
            os.chown(node, *self._account())
            return node

        return (
            {place: own(path, 0o400) for place, path in read.items()},
            {place: own(path, 0o600) for place, path in write.items()},
        )

    def _lend(self, paths: Iterable[Path], given: ExitStack) -> None:
        for path in paths if os.geteuid() == 0 else ():
            if not path.is_block_device():
                whose = path.stat()
                os.chown(path, *self._account())
                given.callback(os.chown, path, whose.st_uid, whose.st_gid)

    def _account(self) -> tuple[int, int]:
        try:
            entry = pwd.getpwnam(self.user)
        except KeyError:
            raise SandboxFailed(f"the sandbox cannot be made: there is no user {self.user!r}") from None
        return entry.pw_uid, entry.pw_gid


def check(argv: Sequence[str], returncode: int, said: Output) -> None:
    """Turn the exit code of a sandboxed tool into nothing, CommandFailed, or SandboxFailed when a signal ended it."""
    if returncode and said.stderr.startswith("bwrap: "):
        raise SandboxFailed(f"the sandbox cannot be made: {said.stderr.strip()}")
    if returncode < 0 or returncode > 128:  # ours, and as bwrap tells of what it started
        number = abs(returncode) if returncode < 0 else returncode - 128
        raise SandboxFailed(f"{argv[0]} went past its bounds in the sandbox: ended by {_name(number)}")
    if returncode:
        raise CommandFailed(argv, returncode, said.stdout, said.stderr)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _bound(option: str, places: Mapping[str, Path]) -> Iterator[str]:
    """The directories above a place are made first: bwrap's own are closed to all but root."""
    for inside, outside in places.items():
        for above in reversed(PurePosixPath(inside).parents[:-1]):
            if above.parts[1] != "usr":
                yield from ("--perms", "0755", "--dir", str(above))
        yield from ("--dev-bind" if outside.is_block_device() else option, str(outside.absolute()), inside)


def _all_output(process: Process, timeout: float) -> Output:
    """What both pipes give until they end, and then the process. Raises SandboxFailed."""
    deadline = time.monotonic() + timeout
    try:
        said = _read_all([pipe for pipe in (process.stdout, process.stderr) if pipe], deadline)
        process.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        raise SandboxFailed(f"a tool in the sandbox was killed, not done within {timeout:g} s") from None
    return Output(*(b"".join(chunks).decode("utf-8", "surrogateescape") for chunks in said))


def _read_all(pipes: Sequence[IO[bytes]], deadline: float) -> list[list[bytes]]:
    """Raises TimeoutError at the deadline, SandboxFailed at MOST_OUTPUT."""
    said: list[list[bytes]] = [[] for _ in pipes]
    total = 0
    with selectors.DefaultSelector() as selector:
        for pipe, chunks in zip(pipes, said, strict=True):
            selector.register(pipe, selectors.EVENT_READ, chunks)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                key.data.append(chunk)
                total += len(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
            if total > MOST_OUTPUT:
                raise SandboxFailed(f"a tool in the sandbox was killed: it said more than {MOST_OUTPUT} bytes")
    return said
