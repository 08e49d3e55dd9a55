"""How many volumes a second come and go on LIO and LVM: create, attach, detach, delete, beside two others.

targetd does the same behind an API of its own, but without accounts, secrets or a record: with one target for all. The
bare script (`lio_bare.py`) makes what we make, and leaves nothing. All three use one thin pool, in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import breakdown, cpu, targetd
from bench.report import Table, median_interval
from bench.service import INITIATOR, Service, running
from tests.support.thinpools import ThinPool, thin_pool

SIZE = 64 << 20
CLIENTS = (1, 8)
#: How many rounds, by the number of clients; in each, every client goes through one cycle. Short rounds: what disturbs
#: the machine for seconds then disturbs all three.
ROUNDS = {1: 21, 8: 9}

Side = Callable[[int], None]
"""Goes through a cycle with each of so many clients at once."""


@dataclass
class Rounds:
    """Seconds of each round of as many cycles as clients, by side; and our CPU over all rounds in milliseconds."""

    clients: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    def rates(self, side: str) -> list[float]:
        return [self.clients / seconds for seconds in self.seconds[side]]


def measure(work: Path, *, quick: bool) -> list[Table]:
    with ExitStack() as stack:
        pool = stack.enter_context(thin_pool(work, "bench", 1 << 30))
        stack.enter_context(targetd.running(str(pool.path), work / "targetd.log"))
        service = stack.enter_context(running(work / "home", **settings(pool)))
        scripts = stack.enter_context(_scripts(pool, max(CLIENTS), work / "bare.lock"))
        sides: dict[str, Side] = {
            "ours": lambda clients: _ours(service, clients),
            "targetd": lambda clients: _targetd(str(pool.path), clients),
            "bare": lambda clients: _bare(scripts, clients),
        }
        measured = [_measure(sides, service, clients, quick=quick) for clients in CLIENTS]
        return [_rates(measured), _costs(measured), *breakdown.run(service, 2 if quick else 20, SIZE)]


def settings(pool: ThinPool) -> dict[str, str]:
    """Of a service that exports volumes of this thin pool by LIO."""
    return {
        "STRATUS_ISCSI__TARGET": "lio",
        "STRATUS_POOLS__DEFAULT": json.dumps({"driver": "lvm", "path": str(pool.path)}),
    }


def _measure(sides: dict[str, Side], service: Service, clients: int, *, quick: bool) -> Rounds:
    found = Rounds(clients)
    for name, side in sides.items():
        side(clients)  # connections, caches, first compilation of statements
        found.seconds[name] = []
    for _ in range(2 if quick else ROUNDS[clients]):
        for name, side in sides.items():
            began = time.perf_counter()
            spent = cpu.spent(service, lambda side=side: side(clients))  # type: ignore[misc]
            found.seconds[name].append(time.perf_counter() - began)
            if name == "ours":
                found.spent = {part: found.spent.get(part, 0) + value for part, value in spent.items()}
    return found


# ---------------------------------------------------------------- the three


def _ours(service: Service, clients: int) -> None:
    def client(_: int) -> None:
        with service.api() as api:
            volume = api.create_volume(SIZE)
            api.detach(api.attach(volume)["id"])
            api.delete_volume(volume)

    _at_once(clients, client)


def _targetd(pool: str, clients: int) -> None:
    def client(number: int) -> None:
        name, initiator = f"targetd-{number}", f"{INITIATOR}-{number}"
        targetd.call("vol_create", pool=pool, name=name, size=SIZE)
        targetd.call("export_create", pool=pool, vol=name, initiator_wwn=initiator, lun=1)
        targetd.call("export_destroy", pool=pool, vol=name, initiator_wwn=initiator)
        targetd.call("vol_destroy", pool=pool, name=name)

    _at_once(clients, client)


def _at_once(clients: int, act: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(clients) as threads:
        for _ in threads.map(act, range(clients)):
            pass


Script = subprocess.Popen[str]


def _bare(scripts: list[Script], clients: int) -> None:
    chosen = scripts[:clients]
    for script in chosen:
        assert script.stdin
        script.stdin.write("cycle\n")
        script.stdin.flush()
    for script in chosen:
        _expect(script, "done")


@contextmanager
def _scripts(pool: ThinPool, count: int, lock: Path) -> Iterator[list[Script]]:
    """Bare scripts that are started already: a language's start is none of their work."""
    with ExitStack() as stack:
        yield [stack.enter_context(_script(pool, number, lock)) for number in range(count)]


@contextmanager
def _script(pool: ThinPool, number: int, lock: Path) -> Iterator[Script]:
    argv = [sys.executable, "-m", "bench.lio_bare", str(pool.path), str(number), str(SIZE), str(lock)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as script:
        _expect(script, "ready")
        yield script


def _expect(script: Script, word: str) -> None:
    assert script.stdout
    if (line := script.stdout.readline().strip()) != word:
        raise RuntimeError(f"lio_bare.py says {line!r} instead of {word!r}")


# ---------------------------------------------------------------- tables


def _rates(measured: list[Rounds]) -> Table:
    sides = ("ours", "targetd", "bare")
    columns = [f"{side}, cycles/s" for side in sides]
    columns += [f"{text} {other}" for other in sides[1:] for text in ("ours /", "95 % from,", "to,")]
    table = Table("Cycles of a volume per second, LIO and LVM", ("clients", "rounds", *columns))
    for found in measured:
        rates = {side: found.rates(side) for side in sides}
        ratios = [[a / b for a, b in zip(rates["ours"], rates[other], strict=True)] for other in sides[1:]]
        told = [value for each in ratios for value in (median(each), *median_interval(each))]
        table.add(found.clients, len(rates["ours"]), *(median(rates[side]) for side in sides), *told)
    table.notes += [
        f"A cycle is create + attach + detach + delete of a volume of {SIZE >> 20} MiB; each client goes through its "
        "own ones. Rounds of the three alternate. Rates are medians over the rounds; a ratio is the median of the "
        "rounds' own ratios, its interval is by order statistics.",
        "targetd: vol_create, export_create, export_destroy, vol_destroy, without CHAP, by Debian's own rtslib. Bare: "
        "lvcreate, rtslib with CHAP, lvremove, in processes that run already.",
        "Aims: faster than targetd, at least 1 / 1.5 = 0.667 of bare.",
    ]
    return table


def _costs(measured: list[Rounds]) -> Table:
    parts = list(measured[0].spent)
    table = Table("CPU of our cycles, ms per cycle", ("clients", *parts, "sum", "elapsed"))
    for found in measured:
        cycles = found.clients * len(found.seconds["ours"])
        spent = [found.spent[part] / cycles for part in parts]
        table.add(found.clients, *spent, sum(spent), sum(found.seconds["ours"]) * 1000 / cycles)
    table.notes.append("Commands: lvcreate, lvremove and what else the worker runs. LIO's own work is nobody's.")
    return table
