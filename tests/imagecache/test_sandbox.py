"""Each wall and each bound of the sandbox, tried from inside; by root, who drops to a user, and by a plain user."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from blockdev import loop
from blockdev.command import CommandFailed
from imagecache import sandbox as module
from imagecache.errors import SandboxFailed
from imagecache.sandbox import Limits, Sandbox
from tests.blockdev.test_command import wait_until_gone
from tests.imagecache.support import nodes_of

#: (how it ended, what it wrote or what the error says)
Outcome = tuple[str, str]
#: One that is below /usr, which every sandbox has.
PYTHON = ("/usr/bin/python3", "-I", "-S", "-c")
SOMEBODY = pwd.getpwnam("nobody")


def outcome(argv: list[str], **options: object) -> Outcome:
    try:
        said = Sandbox().run(argv, **{"timeout": 30, **options})  # type: ignore[arg-type]
    except (CommandFailed, SandboxFailed) as error:
        return type(error).__name__, str(error)
    return "done", said.stdout


def become_somebody() -> None:
    os.setgroups([])
    os.setresgid(*[SOMEBODY.pw_gid] * 3)
    os.setresuid(*[SOMEBODY.pw_uid] * 3)


def become_somebody_who_may_listen() -> None:
    """With CAP_NET_BIND_SERVICE as an ambient capability: the service under systemd, by the unit in contrib/."""
    libc = ctypes.CDLL(None, use_errno=True)
    keep_capabilities, ambient, raise_it, bind_service = 8, 47, 2, 10  # linux/prctl.h, linux/capability.h
    assert libc.prctl(keep_capabilities, 1, 0, 0, 0) == 0
    become_somebody()
    header, held = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[1 << bind_service] * 3, 0, 0, 0)
    assert libc.capset(header, held) == 0
    assert libc.prctl(ambient, raise_it, bind_service, 0, 0) == 0


STARTERS = {
    "root": lambda: None,
    "plain user": become_somebody,
    "plain user who may listen": become_somebody_who_may_listen,
}
Box = Callable[..., Outcome]


@pytest.fixture(params=["root", "plain user"] if os.geteuid() == 0 else ["plain user"])
def starter(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Makes a fork of ours the one who is to start a sandbox."""
    return STARTERS[request.param] if os.geteuid() == 0 else STARTERS["root"]


@pytest.fixture
def box(starter: Callable[[], None]) -> Iterator[Box]:
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=context, initializer=starter) as pool:
        yield lambda argv, **options: pool.submit(partial(outcome, argv, **options)).result()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def mine(path: Path) -> Path:
    """Who starts a sandbox owns what it is to write."""
    path.touch()
    if os.geteuid() == 0:
        os.chown(path, SOMEBODY.pw_uid, SOMEBODY.pw_gid)
    return path


def test_what_a_tool_writes_comes_back(box: Box) -> None:
    assert box(["echo", "hello"]) == ("done", "hello\n")


def test_a_tool_that_fails_is_told_from_one_that_was_ended(box: Box) -> None:
    kind, said = box(["sh", "-c", "echo no luck >&2; exit 3"])
    assert (kind, "exit code 3: no luck" in said) == ("CommandFailed", True)


def test_it_is_nobody_without_privileges(box: Box) -> None:
    code = "import os; print(os.getresuid(), os.getgroups()); os.setuid(0)"
    kind, said = box([*PYTHON, code])
    assert (kind, "PermissionError" in said or "Invalid argument" in said) == ("CommandFailed", True)
    assert box(["id", "-u"]) == ("done", f"{SOMEBODY.pw_uid if os.geteuid() == 0 else os.geteuid()}\n")


@pytest.mark.parametrize("starter", ["plain user who may listen"], indirect=True)
def test_a_service_with_a_capability_for_its_port_can_make_one(box: Box) -> None:
    assert box(["id", "-u"])[0] == "done"


@pytest.mark.parametrize("path", ["/etc/passwd", "/root", "/home", "/var", "/proc/1", "/proc/self", "/sys", __file__])
def test_no_path_of_the_host_is_there(box: Box, path: str) -> None:
    assert Path(path).exists()
    kind, said = box(["stat", path])
    assert (kind, "No such file" in said) == ("CommandFailed", True)


@pytest.mark.parametrize("path", ["/x", "/usr/x", "/dev/x", "/dev/shm/x", "/proc/x"])
def test_nothing_can_be_written_to_but_a_small_scratch(box: Box, path: str) -> None:
    assert box(["touch", path])[0] == "CommandFailed"
    kind, said = box(["sh", "-c", "head -c 2M /dev/zero >/tmp/x"], limits=Limits(file_size=1 << 30))
    assert (kind, "No space left" in said) == ("CommandFailed", True)


def test_a_file_to_read_is_read_only_and_needs_no_open_directories(box: Box, place: Path) -> None:
    closed = place / "closed"
    closed.mkdir()
    file = mine(closed / "file")
    file.write_text("content")
    file.chmod(0o444)
    if os.geteuid() != 0:
        closed.chmod(0o755)
    assert box(["cat", "/deep/in/side"], read={"/deep/in/side": file}) == ("done", "content")
    for act in (["sh", "-c", "echo >/file"], ["chmod", "777", "/file"], ["rm", "/file"]):
        assert box(act, read={"/file": file}, limits=Limits(file_size=100))[0] == "CommandFailed", act
    assert file.read_text() == "content"


def test_a_file_to_write_is_lent(box: Box, place: Path) -> None:
    file = mine(place / "file")
    before = file.stat().st_uid
    assert box(["sh", "-c", "echo told >/out"], write={"/out": file}, limits=Limits(file_size=100)) == ("done", "")
    assert (file.read_text(), file.stat().st_uid) == ("told\n", before)


def test_no_file_grows_past_its_bound(box: Box, place: Path) -> None:
    file = mine(place / "file")
    much = ["sh", "-c", "exec head -c 3M /dev/zero >/out"]
    kind, said = box(much, write={"/out": file}, limits=Limits(file_size=1 << 20))
    assert (kind, "SIGXFSZ" in said) == ("SandboxFailed", True)
    assert file.stat().st_size == 1 << 20


def test_no_host_can_be_connected_to(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as local:
        port, name = listener.getsockname()[1], "\0" + uuid.uuid4().hex
        local.bind(name)
        local.listen()
        for connect in (
            f"socket.create_connection(('127.0.0.1', {port}), 5)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 53))",
            f"socket.socket(socket.AF_UNIX).connect({name!r})",
        ):
            kind, said = box([*PYTHON, f"import socket\n{connect}"])
            assert (kind, "Error" in said) == ("CommandFailed", True), connect


def test_nothing_of_our_environment_is_there(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRATUS_SECRET", "s3cret")
    assert box(["env"]) == ("done", "PATH=/usr/bin:/usr/sbin\nLC_ALL=C\nPWD=/tmp\n")


def test_none_of_our_descriptors_is_there(box: Box, place: Path) -> None:
    with (place / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os, errno\nfor fd in range(3, 64):\n try: print(fd, os.fstat(fd))\n except OSError: pass"
        assert box([*PYTHON, code]) == ("done", "")


def test_nobody_forks_past_the_bound(box: Box) -> None:
    code = "import os, time\nfor n in range(40):\n if not os.fork(): time.sleep(9); os._exit(0)"
    kind, said = box([*PYTHON, code], limits=Limits(processes=20))
    assert (kind, "BlockingIOError" in said) == ("CommandFailed", True)
    assert box([*PYTHON, code.replace("40", "10").replace("sleep(9)", "sleep(0)")], limits=Limits(processes=20)) == (
        "done",
        "",
    )


def test_no_further_user_namespace_can_be_made(box: Box) -> None:
    kind, said = box(["unshare", "--user", "true"])
    assert (kind, "unshare failed" in said) == ("CommandFailed", True)


def test_memory_has_a_bound(box: Box) -> None:
    use = "print(len(bytearray({} << 20)))"
    kind, said = box([*PYTHON, use.format(300)], limits=Limits(memory=256 << 20))
    assert (kind, "MemoryError" in said) == ("CommandFailed", True)
    assert box([*PYTHON, use.format(100)], limits=Limits(memory=256 << 20))[0] == "done"


def test_open_files_have_a_bound(box: Box) -> None:
    kind, said = box([*PYTHON, "files = [open('/dev/null') for _ in range(100)]"], limits=Limits(open_files=32))
    assert (kind, "Too many open files" in said) == ("CommandFailed", True)


def test_processor_time_has_a_bound(box: Box) -> None:
    kind, said = box(["sh", "-c", "while :; do :; done"], limits=Limits(cpu=1), timeout=100)
    assert (kind, "SIGKILL" in said) == ("SandboxFailed", True)


def sleepers() -> tuple[str, list[str]]:
    """A tool with a child that takes leave of it, and how long both sleep: their mark in /proc."""
    mark = f"300.{uuid.uuid4().int % 10**12}"
    return mark, ["sh", "-c", f"setsid sleep {mark} & sleep {mark}"]


def running(mark: str) -> list[int]:
    """The pids of those sleepers, and of what is around them, once both sleep."""
    found: dict[int, str] = {}
    while list(found.values()).count("sleep") < 2:
        time.sleep(0.01)
        found = dict(marked(mark))
    return list(found)


def marked(mark: str) -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if mark in (path / "cmdline").read_text():
                yield int(path.name), (path / "comm").read_text().strip()


def test_wall_clock_has_a_bound_and_nothing_is_left(box: Box) -> None:
    mark, argv = sleepers()
    kind, said = box(argv, timeout=0.5)
    assert (kind, "not done within 0.5 s" in said) == ("SandboxFailed", True)
    for pid, _ in marked(mark):
        wait_until_gone(pid)


def test_who_says_too_much_is_ended(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OUTPUT", 1 << 20)
    kind, said = box(["cat", "/dev/zero"])
    assert (kind, "said more than 1048576 bytes" in said) == ("SandboxFailed", True)


def test_nothing_outlives_a_parent_that_was_killed(starter: Callable[[], None]) -> None:
    mark, argv = sleepers()
    child = os.fork()
    if child == 0:
        try:
            starter()
            Sandbox().run(argv, timeout=300)
        finally:
            os._exit(1)
    left = running(mark)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for pid in left:
        wait_until_gone(pid)


def test_leaving_the_block_kills_and_reaps() -> None:
    mark, argv = sleepers()
    with Sandbox().popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        left = running(mark)
    assert process.returncode == -signal.SIGKILL
    assert process.stdin is not None
    assert process.stdin.closed
    for pid in left:
        wait_until_gone(pid)


def test_it_looks_whether_it_can_be_made() -> None:
    Sandbox().check()
    if os.geteuid() == 0:
        with pytest.raises(SandboxFailed, match="no user 'no-such-user'"):
            Sandbox("no-such-user").check()


def test_a_missing_tool_of_ours_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxFailed, match="prlimit: no such tool in PATH"):
        Sandbox().check()


def test_a_place_that_is_not_there_is_no_failure_of_the_tool(tmp_path: Path) -> None:
    with pytest.raises(SandboxFailed, match="cannot be made"):
        Sandbox().run(["true"], timeout=10, read={"/file": tmp_path / "missing"})


def test_the_interpreter_of_the_service_runs_inside() -> None:
    """Also one that lies below a directory that only its owner may enter."""
    prefix = Path(sys.base_prefix)
    python = prefix / "bin" / f"python3.{sys.version_info.minor}"
    said = Sandbox().run(
        [str(python), "-I", "-S", "-c", "import sys; print(sys.base_prefix)"], timeout=30, read={str(prefix): prefix}
    )
    assert said.stdout == f"{prefix}\n"


def test_a_device_is_given_by_a_node_of_its_own(place: Path) -> None:
    """Whoever the device's own node belongs to: to be read, and not to be written, or both; and the node goes again."""
    disk = place / "disk"
    disk.write_bytes(b"content".ljust(1 << 20, b"\0"))
    with loop.attached(disk) as device:
        kind, said = outcome(["head", "-c", "7", "/device"], read={"/device": device})
        assert (kind, said) == ("done", "content")
        write = ["sh", "-c", "echo changed >/device"]
        kind, said = outcome(write, read={"/device": device}, limits=Limits(file_size=1 << 20))
        assert (kind, "Permission denied" in said) == ("CommandFailed", True)
        assert outcome(write, write={"/device": device}, limits=Limits(file_size=1 << 20))[0] == "done"
        assert nodes_of(device) == []
    assert disk.read_bytes()[:8] == b"changed\n"


def test_nodes_and_files_are_taken_back_when_the_sandbox_cannot_be_made(place: Path) -> None:
    (place / "file").touch()
    (place / "disk").write_bytes(bytes(1 << 20))
    with loop.attached(place / "disk") as device:
        write = {"/device": device, "/file": place / "file", "/missing": place / "missing"}
        with pytest.raises(SandboxFailed, match="cannot be made"):
            Sandbox().popen(["true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, write=write)
        with pytest.raises(SandboxFailed, match="no user"):
            Sandbox("no-such-user").run(["true"], timeout=10, read={"/device": device})
        assert nodes_of(device) == []
    assert (place / "file").stat().st_uid == os.geteuid()


def test_nodes_of_one_that_was_killed_are_swept(place: Path) -> None:
    (place / "disk").write_bytes(bytes(1 << 20))
    mark, argv = sleepers()
    with loop.attached(place / "disk") as device:
        child = os.fork()
        if child == 0:
            try:
                Sandbox().run(argv, timeout=300, read={"/device": device})
            finally:
                os._exit(1)
        running(mark)
        Sandbox().sweep()
        assert len(nodes_of(device)) == 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        Sandbox().sweep()
        assert nodes_of(device) == []
