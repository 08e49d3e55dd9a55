"""What a clone of a full volume costs, and what the guest that writes to it meanwhile feels.

A clone on XFS shares extents: its time is that of their number, not of their bytes. A volume that was written in one go
has a handful; each random write after a clone splits one. Volumes of two sizes, whole and split, are cloned in turn
through the API, while a real initiator writes 4 KiB at a time.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.blocks import GIB, extents, fill, lonely_blocks, overwrite
from bench.filesystem import xfs
from bench.guest import Guest
from bench.hints import hints
from bench.report import Table
from bench.service import Api, running

#: Where the guest writes: little, so that its own writes split the volume no further.
SPAN = 1 << 20


@dataclass
class Case:
    """A volume of `size` bytes of which `overwritten` single blocks are written anew before each clone."""

    size: int
    overwritten: int
    volume: str
    path: Path
    extents: list[int] = field(default_factory=list)
    clone: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)


def _pool(path: Path) -> dict[str, str]:
    """Clones share their bytes: the pool may promise many times what it has."""
    return {"STRATUS_POOLS__DEFAULT__PATH": str(path), "STRATUS_POOLS__DEFAULT__OVERCOMMIT_RATIO": "100"}


def run(work: Path, *, quick: bool) -> list[Table]:
    sizes = (GIB // 16, GIB // 4) if quick else (GIB, 20 * GIB)
    overwrites = (0, 2_000) if quick else (0, 2_000, 20_000)
    with xfs(work, GIB if quick else 30 * GIB) as mount:
        pool = mount / "pool"
        pool.mkdir()
        with running(work / "home", **_pool(pool)) as service, service.api() as api:
            cases = [case for size in sizes for case in _cases(api, pool, size, overwrites)]
            for _ in range(2 if quick else 3):
                _round(api, mount, cases)
        return [_table(cases), _ratios(cases), hints(mount, GIB // 32 if quick else GIB // 8)]


def _cases(api: Api, pool: Path, size: int, overwrites: tuple[int, ...]) -> Iterator[Case]:
    """Clones of one full volume: what is overwritten in them was shared with it, and is split off."""
    volume = api.create_volume(size)
    fill(_backing(pool, volume), size)
    for overwritten in overwrites:
        copy = _clone(api, volume)
        yield Case(size, overwritten, copy, _backing(pool, copy))


def _backing(pool: Path, volume: str) -> Path:
    return pool / "volumes" / f"{volume}.raw"


def _clone(api: Api, volume: str) -> str:
    return str(api.call("POST", "/v1/volumes", {"volume": volume}, expect=201)["id"])


def _round(api: Api, mount: Path, cases: list[Case]) -> None:
    """One clone of each. They are deleted together: XFS goes on freeing their extents when the file is gone."""
    by_splits = sorted(cases, key=lambda case: case.overwritten)
    clones = [_clone_once(api, case) for case in by_splits]
    for clone in clones:
        api.delete_volume(clone)
    subprocess.run(["sync", "--file-system", mount], check=True)


def _clone_once(api: Api, case: Case) -> str:
    """Split the volume anew, attach it, and clone it under the guest's writes."""
    overwrite(case.path, lonely_blocks(case.size, case.overwritten))
    attachment = api.attach(case.volume)
    clones: list[str] = []
    with Guest(attachment, SPAN) as guest:
        seconds = max(0.5, case.clone[-1] / 1000 if case.clone else 0)
        case.quiet.append(_longest(guest, lambda: time.sleep(seconds)))
        case.extents.append(extents(case.path))
        began = time.perf_counter()
        case.stall.append(_longest(guest, lambda: clones.append(_clone(api, case.volume))))
        case.clone.append((time.perf_counter() - began) * 1000)
    api.detach(attachment["id"])
    return clones[0]


def _longest(guest: Guest, act: Callable[[], object]) -> float:
    """Milliseconds of the guest's longest write that ended during `act` or was in flight at its end."""
    guest.reset()
    act()
    guest.wait_for_one()
    return guest.longest


def _table(cases: list[Case]) -> Table:
    columns = ("volume", "random 4 KiB overwrites", "extents", "clone, ms", "longest write, ms", "worst", "no clone")
    table = Table("Clone of a full volume on XFS, under a guest's writes", columns)
    for case in cases:
        figures = (median(case.clone), median(case.stall), max(case.stall), max(case.quiet))
        table.add(f"{case.size / GIB:g} GiB", case.overwritten, int(median(case.extents)), *figures)
    table.notes += [
        "clone: the request through the API, durable at its end. Longest write: the guest's, 4 KiB at a time over "
        "iSCSI, meanwhile. Both are medians of the rounds; worst is the longest of all rounds, no clone the worst of "
        "the same guest for as long while nobody clones.",
        "The same blocks are overwritten again before each clone.",
    ]
    return table


def _ratios(cases: list[Case]) -> Table:
    sizes = sorted({case.size for case in cases})
    small, large = ([case for case in cases if case.size == size] for size in sizes)
    columns = ("random 4 KiB overwrites", "extents, small", "extents, large", "clone, large / small")
    table = Table(f"The same clone at {sizes[1] / GIB:g} GiB and at {sizes[0] / GIB:g} GiB", columns)
    for one, other in zip(small, large, strict=True):
        pairs = zip(one.clone, other.clone, strict=True)
        ratio = median(big / little for little, big in pairs)
        table.add(one.overwritten, int(median(one.extents)), int(median(other.extents)), ratio)
    table.notes.append("Median of the rounds' own ratios. Aim: at most 1.2 at an equal number of extents.")
    return table
