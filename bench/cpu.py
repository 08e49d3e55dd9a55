"""CPU time by process: what it costs, however long it had to wait for the disk or for other users of the machine."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from app.worker_process import tgt_host
from bench.service import Service

PARTS = ("worker", "API", "target", "client")
#: A word of its own in the command line of each child of `stratus-storage serve`.
_WORDS = {"worker": b"worker", "API": b"gunicorn"}
_TICK = 1000 / os.sysconf("SC_CLK_TCK")


def spent(service: Service, act: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of CPU that each of PARTS took during `act`; the client is this process. With LIO the target is no
    process, and the worker's commands are told by themselves.

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
    """Milliseconds of each part so far. A tgtd is a child of the worker, but counts by itself."""
    parents, own, waited = _processes()
    target = _target(service, parents)
    roots = {part: _child(service.pid, word, parents) for part, word in _WORDS.items()} | target
    parts = {part: sum(own[pid] + waited[pid] for pid in _tree(root, parents)) for part, root in roots.items()}
    if not target:
        parts["commands"], parts["worker"] = parts["worker"] - own[roots["worker"]], own[roots["worker"]]
    return {part: ticks * _TICK for part, ticks in parts.items()}


def _target(service: Service, parents: dict[int, int]) -> dict[str, int]:
    """Its process, cut off from the worker's; none where the kernel is the target."""
    settings = service.settings
    if settings.iscsi.target == "lio":
        return {}
    target = tgt_host(settings).daemon.pid
    if target is None:
        raise RuntimeError("the service has no target")
    if parents.pop(target, None) is None:
        raise RuntimeError("the target has gone")
    return {"target": target}


def _processes() -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """By process: its parent; its ticks; those of the children it has waited for. proc_pid_stat(5)."""
    parents: dict[int, int] = {}
    own: dict[int, int] = {}
    waited: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = text.rpartition(")")[2].split()  # from the third on: the name before may hold anything
        parents[int(entry.name)] = int(fields[1])
        own[int(entry.name)] = sum(map(int, fields[11:13]))
        waited[int(entry.name)] = sum(map(int, fields[13:15]))
    return parents, own, waited


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
