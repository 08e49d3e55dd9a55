"""What every benchmark needs to tell its result: percentiles, tables, and the machine it was measured on."""

from __future__ import annotations

import math
import os
import platform
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Table:
    """Rows under columns, and what to know when reading them. Its text is Markdown that also reads on a terminal."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        self.rows.append(cells)

    def text(self) -> str:
        cells = [[_shown(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        rule = ["-" * (width - 1) + ":" for width in widths]
        rule[0] = "-" * widths[0]
        lines = [_line(row, widths) for row in (cells[0], rule, *cells[1:])]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", *lines, "", *notes, *([""] if notes else [])])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *others]) + " |"


def _shown(cell: object) -> str:
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else str(cell)
    digits = max(0, 2 - math.floor(math.log10(abs(cell)))) if cell else 0
    return f"{cell:,.{min(digits, 3)}f}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` per cent of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Where the median lies with at least that confidence, whatever the distribution: two of the values themselves.

    Of n values k lie below the median with the probability of k heads in n tosses. With fewer than six values it is the
    lowest and the highest, and less sure.
    """
    ordered, count = sorted(values), len(values)
    outside, cut = 2 / 2**count, 0
    while cut + 1 < count / 2 and outside + 2 * math.comb(count, cut + 1) / 2**count <= 1 - confidence:
        cut += 1
        outside += 2 * math.comb(count, cut) / 2**count
    return ordered[cut], ordered[-1 - cut]


def milliseconds(act: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1000


def fsync_latency(directory: Path, rounds: int = 50) -> list[float]:
    """Milliseconds of appending 4 KiB to a file and syncing it, as a database's log does."""
    path = directory / "fsync"
    with path.open("wb", buffering=0) as file:

        def append() -> None:
            file.write(bytes(4096))
            os.fdatasync(file.fileno())

        taken = [milliseconds(append) for _ in range(rounds)]
    path.unlink()
    return taken


def machine(directory: Path) -> str:
    """The size of the machine, and the file system of `directory`: what a reader needs to compare with their own."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB memory, Linux {platform.release()}, "
        f"{_file_system(directory)}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def _file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`: proc_pid_mountinfo(5)."""
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return "an unknown file system"
