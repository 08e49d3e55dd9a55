"""Whether our exports by LIO are as fast as one made by hand, and where they differ from it.

Both are of thin volumes in one LVM pool, full before, and both are logged in to by the kernel's initiator. `lio_bare`
is the hand: a target with CHAP, and all else as rtslib and LIO have it.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from uuid import uuid4

from bench import lio_bare
from bench.report import Table, median_interval
from iscsi.lio import LioTarget
from iscsi.lio_configfs import CORE, FABRIC, read
from iscsi.names import target_name
from iscsi.target import Connection, Credentials, Export
from pools.lvm import LvmPool
from tests.support.kernel_initiator import KernelInitiator, running_iscsid
from tests.support.thinpools import thin_pool

PREFIX = "iqn.2026-11.internal.stratus"
PORTAL = ("127.0.0.1", 3270)
SIZE = 128 << 20
PAIRS = 21
TID = 1
NUMBER = 1000


@dataclass(frozen=True)
class Pattern:
    """Blocks of a volume, each once, in order or not, by so many threads at once."""

    name: str
    block: int
    count: int
    threads: int
    write: bool

    def offsets(self) -> list[int]:
        blocks = SIZE // self.block
        if self.count == blocks:
            return [number * self.block for number in range(blocks)]
        return [number * self.block for number in random.sample(range(blocks), self.count)]


PATTERNS = (
    Pattern("4 KiB random read", 4 << 10, 12_000, 8, write=False),
    Pattern("4 KiB random write", 4 << 10, 12_000, 8, write=True),
    Pattern("1 MiB sequential read", 1 << 20, SIZE >> 20, 2, write=False),
    Pattern("1 MiB sequential write", 1 << 20, SIZE >> 20, 2, write=True),
)

#: What we set on purpose.
REASONS = {
    "backstore attrib/emulate_tpu": "discard gives space back to the pool",
    "backstore attrib/emulate_tpws": "the same by WRITE SAME",
    "backstore attrib/emulate_3pc": "no copies between LUNs inside the target",
    "backstore wwn/vendor_id": "what initiators show",
    "backstore wwn/product_id": "what initiators show",
    "backstore wwn/revision": "what initiators show",
    "group attrib/demo_mode_discovery": "discovery tells strangers nothing",
    "group attrib/prod_mode_write_protect": "read-only for an initiator until its own LUN says otherwise",
}


def measure(work: Path, *, quick: bool) -> list[Table]:
    pairs = 3 if quick else PAIRS
    with ExitStack() as stack:
        pool = stack.enter_context(thin_pool(work, "bench", 3 * SIZE))
        stack.enter_context(running_iscsid())
        ours, ours_at = stack.enter_context(_ours(pool.path, work))
        hand, hand_at = stack.enter_context(_by_hand(str(pool.path)))
        attributes = _attributes(ours_at, hand_at)
        ours_device, hand_device = (stack.enter_context(_opened(stack.enter_context(each))) for each in (ours, hand))
        table = _speed_table()
        for pattern in PATTERNS:
            _compare(table, pattern, ours_device, hand_device, pairs)
        return [attributes, table]


# ---------------------------------------------------------------- two exports


@dataclass(frozen=True)
class Places:
    """Where an export's layers lie in configfs."""

    backstore: str
    group: str
    acl: str


def _places(backstore: str, iqn: str) -> Places:
    group = f"{FABRIC}/{iqn}/tpgt_1"
    return Places(backstore, group, f"{group}/acls/{lio_bare.INITIATOR}")


@contextmanager
def _ours(pool_path: Path, work: Path) -> Iterator[tuple[KernelInitiator, Places]]:
    pool, volume = LvmPool("default", pool_path), uuid4()
    pool.activate()
    pool.create(volume, SIZE)
    backing = pool.backing(volume)
    target = LioTarget(PREFIX, [PORTAL], work / "lio.lock")
    target.open_portals()
    credentials = Credentials("ours", lio_bare.PASSWORD)
    connections = (Connection(lio_bare.INITIATOR, credentials),)
    target.ensure_export(Export(volume, TID, backing.path, backing.size, False, connections))
    iqn = target_name(PREFIX, volume)
    backstore = next(str(path) for path in Path(CORE).glob(f"iblock_*/{iqn}"))
    portal = ":".join(map(str, PORTAL))
    try:
        yield (
            KernelInitiator(portal, iqn, lio_bare.INITIATOR, credentials.username, credentials.password),
            _places(backstore, iqn),
        )
    finally:
        while target.drain(volume):
            time.sleep(0.05)
        target.remove(volume)
        pool.delete_volume(volume)


@contextmanager
def _by_hand(pool: str) -> Iterator[tuple[KernelInitiator, Places]]:
    name = "by-hand"
    device = lio_bare.create_volume(pool, name, SIZE)
    made = lio_bare.Bare.make(name, device, NUMBER)
    iqn, portal = str(made.target.wwn), f"{lio_bare.HOST}:{lio_bare.PORT}"
    try:
        yield (
            KernelInitiator(portal, iqn, lio_bare.INITIATOR, lio_bare.USERNAME, lio_bare.PASSWORD),
            _places(f"{CORE}/iblock_{NUMBER}/{name}", iqn),
        )
    finally:
        made.remove()
        lio_bare.delete_volume(pool, name)


# ---------------------------------------------------------------- attributes


def _attributes(ours: Places, hand: Places) -> Table:
    mine, theirs = _settings(ours), _settings(hand)
    table = Table("Where our export differs from one made by hand", ("attribute", "by hand", "ours", "why"))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            table.add(name, theirs.get(name, ""), mine.get(name, ""), REASONS.get(name, "not on purpose"))
    table.notes.append(
        f"{len(mine) - len(table.rows)} of {len(mine)} settings of backstore, portal group, ACL and mapped LUN are "
        "equal. By hand: rtslib with CHAP switched on. Names, numbers and secrets are not compared."
    )
    return table


def _settings(places: Places) -> dict[str, str]:
    found: dict[str, str] = {}
    for layer, root, directories in (
        ("backstore", places.backstore, ("attrib",)),
        ("group", places.group, ("attrib", "param")),
        ("ACL", places.acl, ("attrib", "param")),
    ):
        files = [path for directory in directories for path in sorted(Path(root, directory).iterdir())]
        found |= {f"{layer} {path.relative_to(root)}": read(str(path)) for path in files}
    for layer, root, names in (
        ("backstore", places.backstore, ("wwn/vendor_id", "wwn/product_id", "wwn/revision")),
        ("group", places.group, ("enable",)),
        ("ACL", places.acl, ("cmdsn_depth", "lun_1/write_protect")),
    ):
        found |= {f"{layer} {name}": read(f"{root}/{name}") for name in names}
    return found


# ---------------------------------------------------------------- input and output


@contextmanager
def _opened(initiator: KernelInitiator) -> Iterator[int]:
    """The initiator's device for direct I/O, written from end to end before."""
    descriptor = os.open(initiator.device, os.O_RDWR | os.O_DIRECT)
    try:
        _go(descriptor, PATTERNS[-1])
        yield descriptor
    finally:
        os.close(descriptor)


def _speed_table() -> Table:
    columns = ("direct I/O", "pairs", "by hand, MiB/s", "ours, MiB/s", "ours / by hand", "95 % from", "to")
    table = Table("Input and output through both, kernel initiator", columns)
    table.notes += [
        f"Volumes of {SIZE >> 20} MiB, full. 4 KiB: {PATTERNS[0].count:,} blocks by {PATTERNS[0].threads} threads; "
        f"1 MiB: the whole volume by {PATTERNS[2].threads}. Pairs alternate, and so does who begins; the ratio is the "
        "median of the pairs' own ratios, the interval is by order statistics: it holds whatever their distribution.",
        "Aim: within 15 %.",
    ]
    return table


def _compare(table: Table, pattern: Pattern, ours: int, hand: int, pairs: int) -> None:
    devices = {"ours": ours, "hand": hand}
    speeds: dict[str, list[float]] = {name: [] for name in devices}
    for device in devices.values():
        _go(device, pattern)  # once for nothing
    for number in range(pairs):
        for name in sorted(devices, reverse=bool(number % 2)):
            speeds[name].append(_go(devices[name], pattern))
    ratios = [mine / other for mine, other in zip(speeds["ours"], speeds["hand"], strict=True)]
    told = (median(speeds["hand"]), median(speeds["ours"]), median(ratios), *median_interval(ratios))
    table.add(pattern.name, pairs, *told)


def _go(device: int, pattern: Pattern) -> float:
    """MiB per second."""
    offsets = pattern.offsets()
    parts = [offsets[first :: pattern.threads] for first in range(pattern.threads)]
    act = os.pwritev if pattern.write else os.preadv
    with ThreadPoolExecutor(pattern.threads) as threads:
        began = time.perf_counter()
        for _ in threads.map(lambda part: _each(act, device, part, pattern.block), parts):
            pass
        return len(offsets) * pattern.block / (1 << 20) / (time.perf_counter() - began)


def _each(act: Callable[[int, list[mmap.mmap], int], int], device: int, offsets: Sequence[int], block: int) -> None:
    with mmap.mmap(-1, block) as buffer:  # aligned, as direct I/O wants it
        buffer.write(os.urandom(block))
        for offset in offsets:
            if act(device, [buffer], offset) != block:
                raise OSError(f"less than {block} bytes at {offset}")
