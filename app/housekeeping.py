"""What the worker does between operations: pools and the cache of images watched, events sealed, heads signed, drift
corrected."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable
from uuid import UUID

import structlog
from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from app import events, image_care, uploads
from app.config import Pool as PoolSettings
from app.db import change
from app.events import SYSTEM, record
from app.keys import Signer
from app.models import IdempotencyKey, Pool
from app.outside import Outside
from app.reconcile import converge
from app.states import now
from app.steps import golden
from app.watch import SessionWatch
from blockdev.units import format_size
from iscsi.target import TargetError
from pools import PoolError, open_pool

log = structlog.get_logger()
KEEP_ANSWERS = dt.timedelta(hours=24)
#: An event is in the chain within this many seconds of its commit.
SEAL = 0.5
#: Per cent. A pool whose metadata is a space of its own takes no new work some time after that.
METADATA_ALARM = 70.0
#: Of what a pool may promise. Beyond it there is no golden copy that no volume needs.
PROMISED_ALARM = 0.9


class Housekeeping:
    def __init__(self, outside: Outside, signer: Signer, ready: threading.Event, stopping: threading.Event) -> None:
        self._outside = outside
        self._signer = signer
        self._ready = ready
        self._stopping = stopping
        self._watch = SessionWatch()

    def run(self) -> None:
        """Each chore at its own interval until the worker stops; one that fails is logged and tried again."""
        worker = self._outside.settings.worker
        chores: list[tuple[float, Callable[[], object]]] = [
            (SEAL, self.seal),
            (worker.head_interval, self.sign),
            (worker.pool_interval, self.watch_pools),
            (worker.pool_interval, self.relieve_pools),
            (worker.pool_interval, self.watch_images),
            (worker.pool_interval, self.keep_uploads),
            (worker.pool_interval, self.watch_sessions),
            (worker.reconcile_interval, self.reconcile),
            (3600.0, self.forget_answers),
        ]
        due = [time.monotonic() + interval for interval, _ in chores]
        while not self._stopping.wait(0.1):
            for number, (interval, chore) in enumerate(chores):
                if time.monotonic() >= due[number]:
                    self._do(chore)
                    due[number] = time.monotonic() + interval

    def _do(self, chore: Callable[[], object]) -> None:
        try:
            chore()
        except Exception:
            log.exception("chore failed", chore=chore.__name__)

    def close(self) -> None:
        """At an orderly stop: nothing stays unsealed."""
        while self.seal():
            pass
        self.sign()

    def seal(self) -> int:
        return events.seal(self._outside.database)

    def sign(self) -> None:
        events.sign_head(self._outside.database, self._signer, self._outside.settings.log_dir / "event-heads.jsonl")

    def reconcile(self) -> None:
        if self._ready.is_set():
            converge(self._outside)

    def watch_sessions(self) -> None:
        if self._ready.is_set():
            try:
                self._watch.look(self._outside)
            except TargetError as error:
                log.warning("sessions not seen", cause=str(error))

    def watch_images(self) -> None:
        image_care.watch(self._outside)
        image_care.scrub_next(self._outside)

    def keep_uploads(self) -> None:
        uploads.expire(self._outside.database, self._outside.settings)
        uploads.sweep(self._outside.database, self._outside.settings)

    def forget_answers(self) -> None:
        with self._outside.database.write() as session:
            change(session, delete(IdempotencyKey).where(IdempotencyKey.created_at < now() - KEEP_ANSWERS))

    # ------------------------------------------------------------ pools

    def watch_pools(self) -> None:
        """Activate what is not active, and write down how full each pool is."""
        for name, configured in self._outside.settings.pools.items():
            try:
                if name not in self._outside.pools:
                    self._activate(name, configured)
                self._observe(name, configured)
            except (PoolError, OSError) as error:
                self._outside.pools.pop(name, None)
                self._unusable(name, configured, str(error))
        self._unconfigured()

    def relieve_pools(self) -> None:
        """Where room is scarce, what is only kept to be quick goes: a golden copy at each look."""
        scarce = or_(Pool.alarm.is_not(None), Pool.promised > Pool.size * Pool.overcommit_ratio * PROMISED_ALARM)
        with self._outside.database.read() as session:
            names = session.scalars(select(Pool.name).where(Pool.name.in_(self._outside.pools), scarce)).all()
        for name in names:
            golden.spare(self._outside, name)

    def _activate(self, name: str, configured: PoolSettings) -> None:
        with self._outside.database.read() as session:
            known: UUID | None = session.scalar(select(Pool.pool_id).where(Pool.name == name))
        if configured.path.is_relative_to(self._outside.settings.home) and known is None:
            configured.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        pool = open_pool(name, configured.driver, configured.path, pool_id=known)
        pool.activate()
        swept = pool.sweep()
        log.info("pool active", pool=name, live_clone=pool.live_clone, swept=swept)
        with self._outside.database.write() as session:
            row = _row(session, name, configured)
            row.pool_id, row.state, row.reason, row.live_clone = pool.pool_id, "active", None, pool.live_clone
            row.granularity = pool.granularity
            record(session, SYSTEM, "pool.active", pool=name, live_clone=pool.live_clone)
        self._outside.pools[name] = pool

    def _observe(self, name: str, configured: PoolSettings) -> None:
        usage = self._outside.pools[name].usage()
        with self._outside.database.write() as session:
            row = _row(session, name, configured)
            row.size, row.free, row.allocated, row.updated_at = usage.size, usage.free, usage.allocated, now()
            row.low_space = self._outside.pools[name].reserve = int(usage.size * configured.low_space_percent / 100)
            alarm = _alarm(row, usage.metadata_percent)
            if (alarm is None) != (row.alarm is None):
                kind = "pool.alarm" if alarm else "pool.alarm-over"
                record(session, SYSTEM, kind, pool=name, alarm=alarm, free=row.free, promised=row.promised)
                log.warning(kind, pool=name, alarm=alarm)
            row.alarm = alarm

    def _unusable(self, name: str, configured: PoolSettings, reason: str) -> None:
        with self._outside.database.write() as session:
            row = _row(session, name, configured)
            if row.state == "active" or row.reason != reason:
                record(session, SYSTEM, "pool.unusable", pool=name, reason=reason)
                log.error("pool unusable", pool=name, reason=reason)
            row.state, row.reason, row.updated_at = "unusable", reason, now()

    def _unconfigured(self) -> None:
        names = self._outside.settings.pools.keys()
        with self._outside.database.write() as session:
            for row in session.scalars(select(Pool).where(Pool.name.not_in(names), Pool.state == "active")):
                row.state, row.reason = "unusable", "it is no longer in the configuration"


def _row(session: Session, name: str, configured: PoolSettings) -> Pool:
    row = session.get(Pool, name)
    if row is None:
        row = Pool(name=name, driver=configured.driver, state="unusable", reason="not activated yet", live_clone=False,
                   granularity=1, size=0, free=0, allocated=0, promised=0, low_space=0)  # fmt: skip
        session.add(row)
    row.overcommit_ratio = configured.overcommit_ratio
    return row


def _alarm(row: Pool, metadata_percent: float) -> str | None:
    """What an operator should know before the guests find out."""
    if metadata_percent >= METADATA_ALARM:
        return f"its metadata is {metadata_percent:.0f} % full: give it more before new work is refused"
    if row.free < row.low_space:
        return f"only {format_size(row.free)} free: no new work is taken until there are {format_size(row.low_space)}"
    unwritten = max(row.promised - row.allocated, 0)
    if unwritten > row.free:
        return (
            f"guests may still write {format_size(unwritten)} into what they were promised, and "
            f"{format_size(row.free)} are free: they may meet a full pool"
        )
    return None
