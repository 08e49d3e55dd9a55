from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blockdev.locks import FileLock, LockTimeout


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_one_holder_at_a_time(path: Path) -> None:
    other = FileLock(path)
    with FileLock(path):
        assert not other.try_lock()
    assert other.try_lock()
    other.release()


def test_timeout_names_the_lock(path: Path) -> None:
    with FileLock(path), pytest.raises(LockTimeout, match=r"still locked after 0\.05 s") as late:
        FileLock(path, timeout=0.05).acquire()
    assert (late.value.path, late.value.timeout) == (path, 0.05)


@pytest.mark.parametrize("timeout", [None, 60])
def test_waiter_gets_it_after_the_holder(path: Path, timeout: float | None) -> None:
    order: list[str] = []

    def wait() -> None:
        with FileLock(path, timeout):
            order.append("waiter")

    with FileLock(path):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.1)
        order.append("holder")
    thread.join()
    assert order == ["holder", "waiter"]


def test_threads_count_together(path: Path) -> None:
    total = 0

    def count() -> None:
        nonlocal total
        for _ in range(50):
            with FileLock(path, timeout=60):
                seen = total
                os.sched_yield()
                total = seen + 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total == 200


def test_child_keeps_the_lock_of_a_dead_parent(path: Path) -> None:
    code = f"""
import subprocess
from pathlib import Path
from blockdev.locks import FileLock
lock = FileLock(Path({str(path)!r}))
lock.acquire()
child = subprocess.Popen(["sh", "-c", "echo alive; read line"], pass_fds=[lock.fd])
lock.release()
child.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent:
        assert parent.stdout.readline() == b"alive\n"
        parent.kill()
        os.waitpid(parent.pid, 0)
        assert not FileLock(path).try_lock()
        parent.stdin.close()  # the child's standard input too: it ends
        parent.stdout.read()
    with FileLock(path, timeout=60):
        pass


def test_misuse_is_told(path: Path) -> None:
    lock = FileLock(path)
    with pytest.raises(ValueError, match="not held"):
        lock.release()
    with lock, pytest.raises(ValueError, match="already held"):
        lock.acquire()


def test_file_stays_when_the_lock_goes(path: Path) -> None:
    with FileLock(path):
        inode = path.stat().st_ino
    assert path.stat().st_ino == inode
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_lock_through_a_symbolic_link(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        FileLock(path).acquire()
