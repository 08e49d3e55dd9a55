"""How many volumes a second come and go: create, attach, detach, delete, against the same by a bare script.

Both sides make the same file durable and the same target with its LUN, parameters, account and ACL. Ours goes through
the HTTP API and leaves rows, events and a fence; the bare script (`bare_cycle.sh`) leaves nothing.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench import breakdown
from bench.report import Table, fsync_latency, percentile
from bench.service import Service, running
from iscsi.tgt_daemon import TgtDaemon

SCRIPT = Path(__file__).with_name("bare_cycle.sh")
SIZE = 64 << 20
CONTROL = 31111
CLIENTS = (1, 4, 16)


def run(work: Path, *, quick: bool) -> list[Table]:
    rounds, cycles = (3, 8) if quick else (9, 64)
    with running(work / "home") as service, _bare_target(work / "bare"):
        table = _table()
        for clients in CLIENTS:
            _measure(table, service, work / "bare", clients, rounds, max(1, cycles // clients))
        return [table, *breakdown.run(service, 10 if quick else 100, SIZE)]


def _table() -> Table:
    columns = ("clients", "ours, cycles/s", "bare, cycles/s", "ours / bare", "lowest", "highest", "fsync, ms", "p95")
    notes = [
        "A cycle is create + attach + detach + delete of a volume of 64 MiB; each client goes through its own ones.",
        "Rounds of ours and bare alternate. Rates are medians over the rounds; the ratio is the median of the rounds' "
        "own ratios, beside the lowest and highest of them.",
        "fsync: 4 KiB appended and synced, before each round; p50 and p95.",
    ]
    return Table("Cycles of a volume per second", columns, notes=notes)


def _measure(table: Table, service: Service, bare: Path, clients: int, rounds: int, cycles: int) -> None:
    _ours(service, clients, 1)  # connections, caches, first compilation of statements
    ours: list[float] = []
    others: list[float] = []
    fsync: list[float] = []
    for _ in range(rounds):
        fsync += fsync_latency(bare, 20)
        ours.append(_ours(service, clients, cycles))
        others.append(_bare(bare, clients, cycles))
    ratios = [mine / other for mine, other in zip(ours, others, strict=True)]
    rates = (median(ours), median(others), median(ratios), min(ratios), max(ratios))
    table.add(clients, *rates, percentile(fsync, 50), percentile(fsync, 95))


def _ours(service: Service, clients: int, cycles: int) -> float:
    """Cycles per second of `clients` at once, each on a connection of its own."""
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        done = [pool.submit(_cycle, service, cycles) for _ in range(clients)]
        for future in done:
            future.result()
        return clients * cycles / (time.perf_counter() - began)


def _cycle(service: Service, cycles: int) -> None:
    with service.api() as api:
        for _ in range(cycles):
            volume = api.create_volume(SIZE)
            api.detach(api.attach(volume)["id"])
            api.delete_volume(volume)


def _bare(directory: Path, clients: int, cycles: int) -> float:
    """Cycles per second of as many scripts at once."""
    environment = {**os.environ, "TGT_IPC_SOCKET": "tgtd.sock"}
    argv = [(str(SCRIPT), str(CONTROL), str(tid + 1), str(cycles), str(SIZE), "pool") for tid in range(clients)]
    began = time.perf_counter()
    scripts = [subprocess.Popen(words, cwd=directory, env=environment) for words in argv]
    codes = [script.wait() for script in scripts]
    taken = time.perf_counter() - began
    if any(codes):
        raise RuntimeError(f"{SCRIPT.name} failed: {codes}")
    return clients * cycles / taken


@contextmanager
def _bare_target(directory: Path) -> Iterator[None]:
    """A tgtd for the scripts alone."""
    (directory / "pool").mkdir(parents=True)
    daemon = TgtDaemon(directory, directory / "tgtd.log", CONTROL)
    daemon.start()
    try:
        yield
    finally:
        daemon.stop()
