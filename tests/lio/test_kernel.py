"""The harness itself, on this host: what comes back from a test kernel, and that nothing of it is ever left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.lio.kernel import ROOT, EngineMissing, KernelFailed, run
from tests.lio.uml import Uml
from tests.support.initiator import wait_until

HANGS = "echo it runs; sleep 1000"


def boot(results: Path, script: str, timeout: float = 60) -> int:
    return run(Uml(), ["sh", "-c", script], results, timeout=timeout, memory=256)


def processes(mark: str) -> list[int]:
    """Those with `mark` in their command line; zombies have none."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_output_exit_code_and_files_come_back(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    script = 'uname -n; pwd; echo kept >"$STRATUS_RESULTS/file"; echo gone >/etc/stratus-was-here; exit 7'
    assert boot(tmp_path, script) == 7
    assert capfdbinary.readouterr().out.decode().splitlines() == ["test-kernel", str(ROOT)]
    assert (tmp_path / "file").read_text() == "kept\n"
    assert "Linux version" in (tmp_path / "kernel.log").read_text()
    assert not Path("/etc/stratus-was-here").exists()


def test_a_panic_shows_the_console(tmp_path: Path) -> None:
    with pytest.raises(KernelFailed, match=r"ended by itself(.|\n)*Kernel panic"):
        boot(tmp_path, "echo c >/proc/sysrq-trigger; sleep 1000")


def test_a_timeout_ends_it_and_tells_what_hung(tmp_path: Path) -> None:
    with pytest.raises(KernelFailed, match=r"not done within 6 s(.|\n)*Show Blocked State"):
        boot(tmp_path, HANGS, timeout=6)
    assert processes(f"stratus-kernel-{os.getpid()}-") == []


@contextmanager
def hanging(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A harness whose kernel runs a command without end."""
    argv = [sys.executable, "-m", "tests.lio", "--kernel-memory", "256", "--command", "sh", "-c", HANGS]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        wait_until(lambda: "it runs" in output.read_text(), 60)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_the_kernel_too(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with hanging(tmp_path) as process:
        kernel = f"-{process.pid}-"
        assert processes(f"stratus-kernel{kernel}")
        process.send_signal(number)
        assert process.wait(20) == code
        wait_until(lambda: not processes(f"stratus-kernel{kernel}"))
    left = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert (left == []) == (number != signal.SIGKILL)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EngineMissing, match=r"user-mode-linux.*apt-get install"):
        boot(tmp_path, "true")
    assert list(tmp_path.iterdir()) == []
