"""How long LIO's exports take to come back after configfs was wiped, as a reboot does it, and whether each of many
takes longer than each of few.

The rows are real, the volumes are thin and lie in LVM, and what is timed is what the service's start does before it
opens its portals (`app.reconcile.rebuild`), and then their opening. The numbers of exports are measured in turn, on the
same rows: the attachments beyond a number are set aside.
"""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from uuid import UUID

import rtslib_fb as rtslib  # type: ignore[import-untyped]
from sqlalchemy import select, update

from app.config import load
from app.housekeeping import Housekeeping
from app.ids import new_id
from app.keys import ChapSecrets, Signer, new_chap_secret
from app.models import Attachment, Connection, User, Volume
from app.outside import Outside
from app.reconcile import rebuild
from app.service import Service
from app.supervisor import prepare
from bench.lio_cycles import settings
from bench.report import Table
from iscsi.lio import LioTarget
from pools.lvm_volumes import POOL_TAG, TAG, name_of
from tests.support import rows
from tests.support.thinpools import CONFIG, ThinPool, thin_pool

COUNTS = (50, 150, 500)
ROUNDS = 5
SIZE = 4 << 20
PORTAL = ("127.0.0.1", 3270)


@dataclass
class Timings:
    """Seconds of each round."""

    rebuilding: list[float] = field(default_factory=list)
    opening: list[float] = field(default_factory=list)

    def totals(self) -> list[float]:
        return [one + other for one, other in zip(self.rebuilding, self.opening, strict=True)]


def measure(work: Path, *, quick: bool) -> list[Table]:
    counts = (5, 10, 20) if quick else COUNTS
    timings = {count: Timings() for count in counts}
    with thin_pool(work, "bench", 512 << 20, metadata=16 << 20) as pool, _site(work / "home", pool) as outside:
        volumes = [new_id() for _ in range(max(counts))]
        _make_volumes(outside, pool, volumes)
        _attach(outside, volumes)
        for _ in range(2 if quick else ROUNDS):
            for count in counts:
                _choose(outside, volumes[:count])
                _round(outside, timings[count], count, work / "lio.lock")
        _wipe()
    return [_table(timings)]


def _round(outside: Outside, timings: Timings, count: int, lock: Path) -> None:
    _wipe()
    target = LioTarget(outside.settings.iscsi.iqn_prefix, [PORTAL], lock)
    outside.target = target
    began = time.perf_counter()
    rebuild(outside)
    rebuilt = time.perf_counter()
    target.open_portals()
    opened = time.perf_counter()
    timings.rebuilding.append(rebuilt - began)
    timings.opening.append(opened - rebuilt)
    whole = [state for state in target.inventory() if state.complete]
    if len(whole) != count:
        raise RuntimeError(f"{len(whole)} of {count} exports came back")


def _wipe() -> None:
    rtslib.RTSRoot().clear_existing(confirm=True)


def _table(timings: dict[int, Timings]) -> Table:
    least, *_ = timings
    columns = ("exports", "rounds", "rebuild, s", "portals, s", "total, s", "lowest", "highest", "each, ms")
    table = Table("Every export rebuilt after configfs was wiped", (*columns, f"each / each of {least}"))
    each = {count: [seconds / count for seconds in found.totals()] for count, found in timings.items()}
    for count, found in timings.items():
        totals = found.totals()
        ratio = median(mine / other for mine, other in zip(each[count], each[least], strict=True))
        medians = (median(found.rebuilding), median(found.opening), median(totals))
        table.add(count, len(totals), *medians, min(totals), max(totals), median(each[count]) * 1000, ratio)
    table.notes += [
        f"Thin volumes of {SIZE >> 20} MiB in LVM, one attachment with CHAP each. The numbers take turns; times are "
        "medians of the rounds, the ratio is the median of the rounds' own ratios. All exports were whole afterwards.",
        "Aim: flat, each of 500 takes no longer than each of 50.",
    ]
    return table


# ---------------------------------------------------------------- what is exported


@contextmanager
def _site(home: Path, pool: ThinPool) -> Iterator[Outside]:
    """What a worker holds, with its pool active."""
    loaded = load(home, environ={**os.environ, **settings(pool)})
    prepare(loaded)
    service = Service(loaded)
    outside = Outside(loaded, service.database, service.keys, LioTarget(loaded.iscsi.iqn_prefix, [PORTAL], home / "lk"))
    signer = Signer.load_or_create(loaded.key_dir / "events.key")
    Housekeeping(outside, signer, threading.Event(), threading.Event()).watch_pools()
    try:
        yield outside
    finally:
        service.database.close()


def _make_volumes(outside: Outside, thin: ThinPool, volumes: list[UUID]) -> None:
    """As the pool makes them, but in one lvm(8), which takes its commands from stdin."""
    pool = outside.pools["default"]
    options = f"--virtualsize {SIZE}b --thinpool {thin.name} --addtag {TAG} --addtag {POOL_TAG}{pool.pool_id}"
    commands = [f"lvcreate --config '{CONFIG}' --name {name_of('v', id)} {options} {thin.group}\n" for id in volumes]
    subprocess.run(["lvm"], input="".join(commands), text=True, capture_output=True, check=True)
    pool.activate()  # it learns which there are, as at a start
    if len(pool.inventory()) != len(volumes):
        raise RuntimeError("lvm(8) did not make all volumes")


def _attach(outside: Outside, volumes: list[UUID]) -> None:
    with outside.database.write() as session:
        owner = session.scalars(select(User.id)).first()
        assert owner
        for number, volume in enumerate(volumes, start=1):
            session.add(rows.volume(owner, number, id=volume, size=SIZE, state="in-use", held_mode="rw"))
            session.flush()
            held = rows.attachment(owner, volume)
            session.add(held)
            session.flush()
            session.add(_connection(outside, held))


def _connection(outside: Outside, attachment: Attachment) -> Connection:
    key_id, secret = outside.keys.seal(attachment.id, ChapSecrets(new_chap_secret()))
    return Connection(
        id=new_id(), attachment_id=attachment.id, role="primary", initiator=attachment.initiator, networks=[],
        portal=":".join(map(str, PORTAL)), username=f"a{attachment.id.hex}", mutual=False, key_id=key_id, secret=secret,
        created_at=dt.datetime.now(dt.UTC),
    )  # fmt: skip


def _choose(outside: Outside, volumes: list[UUID]) -> None:
    """These are attached and no others."""
    with outside.database.write() as session:
        session.execute(update(Attachment).values(state="error"))
        session.execute(update(Attachment).where(Attachment.volume_id.in_(volumes)).values(state="attached"))
        session.execute(update(Volume).values(error=None))
