"""CPU time by process: what it costs, however long it had to wait for the disk or for other users of the machine."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from app.config import load
from app.worker_process import tgt_daemon
from bench.service import Service

PARTS = ("worker", "API", "target", "client")
#: A word of its own in the command line of each child of `stratus-storage serve`.
_WORDS = {"worker": b"worker", "API": b"gunicorn"}
_TICK = 1000 / os.sysconf("SC_CLK_TCK")


def spent(service: Service, act: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of CPU that each of PARTS took during `act`; the client is this process.

    The kernel counts the service's in ticks, of 10 ms as a rule: `act` should last.
    """
    before, began = _parts(service), time.process_time()
    act()
    client = (time.process_time() - began) * 1000
    after = _parts(service)
    return {part: after[part] - before[part] for part in after} | {"client": client}


def children_spent() -> float:
    """Milliseconds of CPU of this process's children that have ended, and of theirs: getrusage(2)."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1000


def _parts(service: Service) -> dict[str, float]:
    """Milliseconds of each part so far. The target is a child of the worker, but counts by itself."""
    parents, ticks = _processes()
    target = tgt_daemon(load(service.home)).pid
    if target is None:
        raise RuntimeError("the service has no target")
    if parents.pop(target, None) is None:
        raise RuntimeError("the target has gone")
    roots = {part: _child(service.pid, word, parents) for part, word in _WORDS.items()} | {"target": target}
    return {part: sum(ticks[pid] for pid in _tree(root, parents)) * _TICK for part, root in roots.items()}


def _processes() -> tuple[dict[int, int], dict[int, int]]:
    """By process: its parent; its ticks with those of the children it has waited for. proc_pid_stat(5)."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = text.rpartition(")")[2].split()  # from the third on: the name before may hold anything
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    return parents, ticks


def _child(parent: int, word: bytes, parents: dict[int, int]) -> int:
    for pid, its_parent in parents.items():
        if its_parent == parent and word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    raise RuntimeError(f"the service has no {word.decode()}")


def _tree(root: int, parents: dict[int, int]) -> Iterator[int]:
    yield root
    for pid, parent in parents.items():
        if parent == root:
            yield from _tree(pid, parents)
