"""What it takes to have a volume of an image that is here already: a warm start.

An image reaches a pool once, as a golden copy; from then on a volume of it is a clone, whose time is that of its
extents and not of its bytes. Images of two sizes, every byte of them written, are started in turn through the API,
beside a plain copy of the larger one. Then one of them is started by ever more clients at once: the work of all must
not cost each of them more than twice what it costs one alone on as many cores.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.blocks import GIB, extents, fill
from bench.filesystem import xfs
from bench.report import Table, fsync_latency, median_interval, milliseconds, percentile
from bench.service import Api, Service, Unexpected, running

CLIENTS = (1, 8, 32)
#: Seconds within which an image of the larger size is made, or its golden copy.
LONGEST = 3600.0


@dataclass
class Case:
    """An image of `size` bytes, and the milliseconds of each start from it."""

    size: int
    image: str
    golden: int = 0
    first: float = 0.0
    starts: list[float] = field(default_factory=list)


@dataclass
class Crowd:
    """Starts by so many clients at once: milliseconds between two ends, of each round, and each start's own."""

    clients: int
    rounds: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)


def _settings(mount: Path) -> dict[str, str]:
    """Cache and pool on the file system that is measured. Clones share their bytes: the pool may promise many times
    what it has."""
    return {
        "STRATUS_POOLS__DEFAULT__PATH": str(mount / "pool"),
        "STRATUS_POOLS__DEFAULT__OVERCOMMIT_RATIO": "1000",
        "STRATUS_IMAGES__PATH": str(mount / "images"),
        "STRATUS_IMAGES__RESERVE": str(16 << 20),
        "STRATUS_IMAGES__HIGH_MARK": "100%",
        "STRATUS_IMAGES__LOW_MARK": "100%",
    }


def run(work: Path, *, quick: bool) -> list[Table]:
    sizes = (GIB // 16, GIB // 4) if quick else (GIB, 20 * GIB)
    with xfs(work, 2 * GIB if quick else 50 * GIB) as mount:
        for name in ("pool", "images"):
            (mount / name).mkdir()
        with running(work / "home", **_settings(mount)) as service, service.api() as api:
            copied = _copy(api, mount, sizes[-1])
            cases = [_case(api, mount, size) for size in sizes]
            for _ in range(3 if quick else 20):
                _round(api, cases)
            crowds = _crowds(service, cases[0].image, rounds=2 if quick else 5, starts=8 if quick else 64)
            fsync = median(fsync_latency(mount))
        return [_table(cases, copied), _by_clients(crowds, fsync)]


# ---------------------------------------------------------------- one after the other


def _copy(api: Api, mount: Path, size: int) -> float:
    """Milliseconds of a plain copy of a full volume of that size, durable at its end."""
    volume = _full(api, mount, size)
    copy = mount / "copy"
    argv = ["cp", "--reflink=never", "--sparse=never", str(_backing(mount, volume)), str(copy)]

    def copied() -> None:
        subprocess.run(argv, check=True)
        subprocess.run(["sync", copy], check=True)

    taken = milliseconds(copied)
    copy.unlink()
    api.delete_volume(volume)
    return taken


def _case(api: Api, mount: Path, size: int) -> Case:
    """An image of a full volume, and its golden copy by a first start."""
    volume = _full(api, mount, size)
    image = str(_made(api, "/v1/images", {"volume": volume})["id"])
    api.delete_volume(volume)
    case = Case(size, image)
    began = time.perf_counter()
    start = str(_made(api, "/v1/volumes", {"image": image})["id"])
    case.first = (time.perf_counter() - began) * 1000
    case.golden = extents(_backing(mount, start))
    api.delete_volume(start)
    return case


def _full(api: Api, mount: Path, size: int) -> str:
    volume = api.create_volume(size)
    fill(_backing(mount, volume), size)
    return volume


def _backing(mount: Path, volume: str) -> Path:
    return mount / "pool" / "volumes" / f"{volume}.raw"


def _round(api: Api, cases: Iterable[Case]) -> None:
    """One start of each. They are deleted together: XFS goes on freeing their extents when the file is gone."""
    volumes = [_timed_start(api, case.image, case.starts) for case in cases]
    for volume in volumes:
        api.delete_volume(volume)


def _timed_start(api: Api, image: str, taken: list[float]) -> str:
    began = time.perf_counter()
    volume = str(api.call("POST", "/v1/volumes", {"image": image}, expect=201)["id"])
    taken.append((time.perf_counter() - began) * 1000)
    return volume


def _made(api: Api, path: str, body: Any) -> Any:
    """The record of long work, waited for."""
    try:
        return api.call("POST", path, body, expect=201)
    except Unexpected as answer:
        if answer.status != 202:
            raise
    found = api.call("GET", "/v1/operations?limit=1")["items"][0]
    ends = time.monotonic() + LONGEST
    while found["state"] in ("queued", "running") and time.monotonic() < ends:
        found = api.call("GET", f"/v1/operations/{found['id']}?wait=30")
    if found["state"] != "succeeded":
        raise RuntimeError(f"{found['kind']}: {found['state']}: {found['error']}")
    return api.call("GET", f"{path}/{found['resource']['id']}")


# ---------------------------------------------------------------- many at once


def _crowds(service: Service, image: str, rounds: int, starts: int) -> list[Crowd]:
    """Rounds that alternate between the numbers of clients; each of about `starts` starts."""
    crowds = [Crowd(clients) for clients in CLIENTS]
    for crowd in crowds * rounds:
        each = max(1, starts // crowd.clients)
        with ThreadPoolExecutor(crowd.clients) as pool, service.api() as api:
            began = time.perf_counter()
            done = list(pool.map(lambda _, each=each: _client(service, image, each), range(crowd.clients)))
            seconds = time.perf_counter() - began
            for volumes, taken in done:
                crowd.starts += taken
                for volume in volumes:
                    api.delete_volume(volume)
        crowd.rounds.append(seconds * 1000 / (each * crowd.clients))
    return crowds


def _client(service: Service, image: str, count: int) -> tuple[list[str], list[float]]:
    taken: list[float] = []
    with service.api() as api:
        return [_timed_start(api, image, taken) for _ in range(count)], taken


# ---------------------------------------------------------------- tables


def _table(cases: list[Case], copied: float) -> Table:
    columns = ("image", "extents", "first start, ms", "warm start, ms", "from", "to", "copy / warm start")
    table = Table("From an image in the cache to a volume, on XFS", columns)
    for case in cases:
        low, high = median_interval(case.starts)
        ratio = copied / median(case.starts) if case is cases[-1] else "-"
        name = f"{case.size / GIB:g} GiB"
        table.add(name, case.golden, case.first, median(case.starts), low, high, ratio)
    small, large = cases[0], cases[-1]
    grown = median(more / less for less, more in zip(small.starts, large.starts, strict=True))
    table.notes += [
        "The first start makes the pool's golden copy; a warm one is the request through the API, durable at its end. "
        "From, to: where the median lies with 95 % confidence.",
        f"The larger image against the smaller, median of the rounds' ratios: {grown:.2f}. Aim: at most 1.2.",
        f"The copy is `cp --reflink=never` and sync of {large.size / GIB:g} GiB on the same file system: "
        f"{copied / 1000:.1f} s, once. Aim: at least 100 warm starts.",
        "Beside it: the seed had 6.07 minutes of prolog on average.",
    ]
    return table


def _by_clients(crowds: list[Crowd], fsync: float) -> Table:
    cores = len(os.sched_getaffinity(0))
    columns = ("clients", "starts", "service time per start, ms", "of one, per core", "answer, ms", "p95")
    table = Table("Warm starts at once", columns)
    alone = median(crowds[0].rounds) / cores
    for crowd in crowds:
        per_start = median(crowd.rounds)
        answers = (median(crowd.starts), percentile(crowd.starts, 95))
        table.add(crowd.clients, len(crowd.starts), per_start, f"{per_start / alone:.2f}", *answers)
    table.notes += [
        "Service time: the time of a round divided by its starts, median of the rounds, which alternate. Of one, per "
        f"core: against that of one client divided by {cores} cores. Aim at {crowds[-1].clients}: at most 2.",
        f"4 KiB appended and synced on the same file system: {fsync:.2f} ms.",
    ]
    return table
