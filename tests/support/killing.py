"""Ends in the middle of things: a copy of this process does the work, and is ended by SIGKILL."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Do `work` in a fork, kill that after some time, and say whether the work was not done by then."""
    child = _forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return _ended(child)


def killed_by_itself(work: Callable[[], object]) -> bool:
    """Do `work`, which may kill its process, in a fork, and say whether it did."""
    return _ended(_forked(work))


@contextmanager
def in_forks(*works: Callable[[], object]) -> Iterator[None]:
    """Do all of them, each in a fork, while the block runs; at its end they have succeeded."""
    children = [_forked(work) for work in works]
    try:
        yield
    finally:
        killed = [_ended(child) for child in children]
    assert not any(killed)


def _forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def _ended(child: int) -> bool:
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the work failed: {status}"
    return status == signal.SIGKILL
