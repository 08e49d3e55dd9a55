"""What differs between two thin volumes, told by the thin pool's own metadata."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockdev.command import run
from pools.interface import Extent
from pools.lvm_commands import Lvm
from pools.lvm_devices import SECTOR, ThinPoolStatus

TIMEOUT = 600.0
_ZEROS = {"left_only": True, "right_only": False, "different": False}


@contextmanager
def metadata_snapshot(lvm: Lvm, pool: Path) -> Iterator[None]:
    """The metadata of the thin pool device `pool` held still, to be read beside its use.

    A thin pool has at most one, so whoever comes here holds a lock: what exists already was left by one who died. While
    it exists nothing that is deleted gives its space back. Raises CommandError.
    """
    release(lvm, pool)
    lvm.message(pool, "reserve_metadata_snap")
    try:
        yield
    finally:
        lvm.message(pool, "release_metadata_snap")


def release(lvm: Lvm, pool: Path) -> None:
    """Let go of a metadata snapshot, if there is one. Raises CommandError."""
    if ThinPoolStatus.parse(lvm.status(pool)).held:
        lvm.message(pool, "release_metadata_snap")


def thin_delta(metadata: Path, old: int, new: int, size: int) -> list[Extent]:
    """Where thin device `new`, of `size` bytes, differs from `old`, by the metadata snapshot on the device `metadata`.

    Whole chunks of the pool, in order, neighbours joined: thin_delta(8). Raises CommandError.
    """
    argv = ["thin_delta", "--metadata-snap", "--thin1", str(old), "--thin2", str(new), str(metadata)]
    root = ElementTree.fromstring(run(argv, timeout=TIMEOUT).stdout)
    chunk = int(root.attrib["data_block_size"]) * SECTOR
    return list(_joined(_extents(root, chunk, size)))


def _extents(root: ElementTree.Element, chunk: int, size: int) -> Iterator[Extent]:
    for element in root.iterfind("diff/*"):
        if element.tag in _ZEROS:
            start = int(element.attrib["begin"]) * chunk
            end = min(start + int(element.attrib["length"]) * chunk, size)
            if start < end:  # `old` may be the larger one
                yield Extent(start, end - start, _ZEROS[element.tag])


def _joined(extents: Iterator[Extent]) -> Iterator[Extent]:
    last: Extent | None = None
    for extent in extents:
        if last and (last.offset + last.length, last.zeros) == (extent.offset, extent.zeros):
            last = Extent(last.offset, last.length + extent.length, last.zeros)
            continue
        if last:
            yield last
        last = extent
    if last:
        yield last
