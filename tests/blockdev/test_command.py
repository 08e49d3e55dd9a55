from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockdev.command import CommandFailed, CommandMissing, CommandTimeout, run
from blockdev.locks import FileLock


def gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody reaped is gone too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pid: int) -> None:
    for _ in range(1000):
        if gone(pid):
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} outlived the one who waited for it")


def test_output_is_returned() -> None:
    output = run(["sh", "-c", "echo out; echo err >&2"], timeout=10)
    assert (output.stdout, output.stderr) == ("out\n", "err\n")


def test_stdin_is_the_input() -> None:
    assert run(["cat"], timeout=10, input="tëxt").stdout == "tëxt"


def test_stdin_is_never_ours() -> None:
    code = "from blockdev.command import run; print(run(['cat'], timeout=10).stdout)"
    ours = subprocess.run([sys.executable, "-c", code], input="ours", capture_output=True, text=True, check=True)
    assert ours.stdout == "\n"


def test_arguments_reach_no_shell() -> None:
    assert run(["printf", "%s|", "$HOME", "a b", "*"], timeout=10).stdout == "$HOME|a b|*|"


def test_bytes_that_are_no_text_survive() -> None:
    assert os.fsencode(run(["printf", r"\377"], timeout=10).stdout) == b"\xff"


def test_environment_is_added_to_ours() -> None:
    assert run(["sh", "-c", "echo $COLOUR $LC_ALL"], timeout=10, env={"COLOUR": "red"}).stdout == "red C\n"


def test_failure_carries_everything() -> None:
    with pytest.raises(CommandFailed, match="exit code 3: no luck") as failed:
        run(["sh", "-c", "echo tried; echo no luck >&2; exit 3"], timeout=10)
    error = failed.value
    assert (error.argv[0], error.returncode, error.stdout, error.stderr) == ("sh", 3, "tried\n", "no luck\n")


def test_death_by_a_signal_is_a_failure() -> None:
    with pytest.raises(CommandFailed) as failed:
        run(["sh", "-c", "kill -9 $$"], timeout=10)
    assert failed.value.returncode == -signal.SIGKILL


def test_missing_tool_is_named() -> None:
    with pytest.raises(CommandMissing, match="no-such-tool: no such tool in PATH") as missing:
        run(["no-such-tool", "--help"], timeout=10)
    assert missing.value.tool == "no-such-tool"


def test_timeout_kills_the_tool_and_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(CommandTimeout) as late:
        run(["sh", "-c", f"sleep 300 & echo $$ $! > {pids}; wait"], timeout=0.3)
    assert late.value.timeout == 0.3
    tool, child = map(int, pids.read_text().split())
    assert not Path(f"/proc/{tool}").exists(), "it was not reaped"
    wait_until_gone(child)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_tool_dies_with_the_one_who_waits(tmp_path: Path, number: int) -> None:
    pid_file = tmp_path / "pid"
    tool = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec sleep 300"
    code = f"""
import signal, sys
from blockdev.command import run
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
run(["sh", "-c", {tool!r}], timeout=300)
"""
    waiter = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    with waiter:
        while not pid_file.exists():
            assert waiter.poll() is None
            time.sleep(0.01)
        waiter.send_signal(number)
        try:
            waiter.wait(30)
        finally:
            waiter.kill()
    wait_until_gone(int(pid_file.read_text()))


def test_a_tool_that_is_only_asked_to_end_obeys(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with pytest.raises(CommandTimeout, match="sent SIGTERM, not done within"):
        run(["sh", "-c", f"trap 'touch {told}; exit 0' TERM; while :; do sleep 0.05; done"], timeout=0.3,
            ending=signal.SIGTERM)  # fmt: skip
    assert told.exists()


def test_a_tool_that_cannot_end_keeps_its_lock_until_it_does(tmp_path: Path) -> None:
    end, lock = tmp_path / "end", FileLock(tmp_path / "lock")
    with lock, pytest.raises(CommandTimeout):
        run(["sh", "-c", f"trap '' TERM; until [ -e {end} ]; do sleep 0.05; done"], timeout=0.3,
            pass_fds=[lock.fd], ending=signal.SIGTERM)  # fmt: skip
    assert not lock.try_lock()
    end.touch()
    with FileLock(lock.path, timeout=30):
        pass


def test_descriptors_are_passed_on_request_only(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock") as lock:
        look = ["sh", "-c", f"readlink /proc/self/fd/{lock.fd} || true"]
        assert run(look, timeout=10).stdout == ""
        assert run(look, timeout=10, pass_fds=[lock.fd]).stdout == f"{tmp_path}/lock\n"
