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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import breakdown, cpu
from bench.report import Table, fsync_latency, percentile
from bench.service import Service, running
from iscsi.tgt_daemon import TgtDaemon

SCRIPT = Path(__file__).with_name("bare_cycle.sh")
SIZE = 64 << 20
CONTROL = 31111
CLIENTS = (1, 4, 16)


#: Rounds are made for SECONDS with each number of clients, but LEAST of them on the slowest machine.
SECONDS = 20
LEAST = 3


@dataclass
class Rounds:
    """What was measured with so many clients: rates of each round, and CPU of all the rounds in milliseconds."""

    clients: int
    cycles: int = 0
    seconds: float = 0.0
    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    fsync: list[float] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(cpu.PARTS, 0.0))
    bare_spent: float = 0.0


def run(work: Path, *, quick: bool) -> list[Table]:
    seconds, cycles = (0, 8) if quick else (SECONDS, 48)
    bare = work / "bare"
    with running(work / "home") as service, _bare_target(bare):
        measured = [_measure(service, bare, clients, seconds, max(1, cycles // clients)) for clients in CLIENTS]
        return [_rates(measured), _costs(measured), *breakdown.run(service, 10 if quick else 100, SIZE)]


def _measure(service: Service, bare: Path, clients: int, seconds: float, cycles: int) -> Rounds:
    """Rounds of `cycles` by each client, for so many seconds."""
    _ours(service, clients, 1)  # connections, caches, first compilation of statements
    found = Rounds(clients)
    ends = time.monotonic() + seconds
    while len(found.ours) < LEAST or time.monotonic() < ends:
        _round(found, service, bare, cycles)
    return found


def _round(found: Rounds, service: Service, bare: Path, cycles: int) -> None:
    found.fsync += fsync_latency(bare, 20)
    spent = cpu.spent(service, lambda: found.ours.append(_ours(service, found.clients, cycles)))
    found.spent = {part: found.spent[part] + spent[part] for part in cpu.PARTS}
    before = cpu.children_spent()
    found.bare.append(_bare(bare, found.clients, cycles))
    found.bare_spent += cpu.children_spent() - before
    found.cycles += found.clients * cycles
    found.seconds += found.clients * cycles / found.ours[-1]


def _rates(measured: list[Rounds]) -> Table:
    columns = ("clients", "rounds", "ours, cycles/s", "bare, cycles/s", "ours / bare", "lowest", "highest")
    table = Table("Cycles of a volume per second", (*columns, "fsync, ms", "p95"))
    for found in measured:
        ratios = [mine / other for mine, other in zip(found.ours, found.bare, strict=True)]
        rates = (median(found.ours), median(found.bare), median(ratios), min(ratios), max(ratios))
        fsync = (percentile(found.fsync, 50), percentile(found.fsync, 95))
        table.add(found.clients, len(ratios), *rates, *fsync)
    table.notes += [
        "A cycle is create + attach + detach + delete of a volume of 64 MiB; each client goes through its own ones.",
        "Rounds of ours and bare alternate. Rates are medians over the rounds; the ratio is the median of the rounds' "
        "own ratios, beside the lowest and highest of them.",
        "fsync: 4 KiB appended and synced, before each round; p50 and p95.",
    ]
    return table


def _costs(measured: list[Rounds]) -> Table:
    columns = ("clients", *cpu.PARTS, "sum", "elapsed", "sum, of all cores", "bare")
    table = Table("CPU of the same cycles, ms per cycle", columns)
    cores = len(os.sched_getaffinity(0))
    for found in measured:
        total, elapsed = sum(found.spent.values()), found.seconds * 1000
        parts = [milliseconds / found.cycles for milliseconds in (*found.spent.values(), total)]
        share = f"{total / elapsed / cores:.0%}"
        table.add(found.clients, *parts, elapsed / found.cycles, share, found.bare_spent / found.cycles)
    table.notes += [
        "Elapsed is the time of a round by its cycles. What the sum leaves of all cores went to waiting for the disk "
        "and for one another, and to whatever else ran on the machine.",
        "The client is the benchmark itself. Bare: the script and the tools it starts, without its target.",
    ]
    return table


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
