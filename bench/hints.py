"""What XFS's extent-size hints would change: fewer extents to clone, for more space and slower small writes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from bench.blocks import extents, fill, overwrite, random_blocks
from bench.report import Table, milliseconds
from blockdev.extents import reflink

SHARES = (0.3, 1.0)


def hints(mount: Path, size: int) -> Table:
    """Files of `size` bytes written at random, with and without a hint of 1 MiB; each then cloned."""
    columns = ("file", "written at random", "hint", "writing, s", "extents", "clone, ms", "allocated, MiB")
    table = Table(f"Extent-size hints of XFS, on {size >> 20} MiB", columns)
    for share in SHARES:
        for hint in ("", "extsize 1m"):
            _measure(table, mount, size, share, hint, "sparse", lambda path: None)
        for hint in ("", "cowextsize 1m"):
            _measure(table, mount, size, share, hint, "full and cloned", lambda path: _full_and_cloned(path, size))
    table.notes.append(
        "Random blocks of 4 KiB, synced every 256. clone: FICLONE and fsync of a file, nobody writing. Without a hint "
        "XFS allocates copied-on-write blocks in pieces of 128 KiB."
    )
    return table


def _measure(
    table: Table, mount: Path, size: int, share: float, hint: str, kind: str, prepare: Callable[[Path], None]
) -> None:
    path = mount / "hinted"
    with path.open("wb") as file:
        file.truncate(size)
    if hint:
        subprocess.run(["xfs_io", "-c", hint, path], check=True)
    prepare(path)
    blocks = random_blocks(size, share)
    writing = milliseconds(lambda: overwrite(path, blocks)) / 1000
    count = extents(path)
    clone = milliseconds(lambda: _cloned(path, mount / "clone"))
    table.add(kind, f"{share:.0%}", hint or "none", writing, count, clone, path.stat().st_blocks >> 11)
    for made in mount.glob("*hinted*"), mount.glob("clone"):
        for leftover in made:
            leftover.unlink()


def _full_and_cloned(path: Path, size: int) -> None:
    fill(path, size)
    _cloned(path, path.with_name("base-hinted"))


def _cloned(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        reflink(old.fileno(), new.fileno())
        os.fsync(new.fileno())
