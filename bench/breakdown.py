"""Where the time of a cycle goes, for one client: told by the times that every operation's row keeps anyhow.

    request sent ─▶ created_at ─▶ started_at ─▶ finished_at ─▶ answer received
              accept        wake          act           settle

accept: HTTP, sign-in, checks, the write lock.  wake: commit of the intention, notification.
act: the claim and its commit, hand-over to a thread, the outside act.  settle: commit of the result, notification,
answer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from uuid import UUID

from sqlalchemy import select

from app.db import Database
from app.models import Operation
from bench import cpu
from bench.report import Table, fsync_latency, milliseconds
from bench.service import Api, Service

PHASES = ("accept", "wake", "act", "settle")
Trace = dict[str, list[tuple[float, ...]]]


def run(service: Service, cycles: int, size: int) -> list[Table]:
    with service.api() as api:
        requests: list[Request] = []
        spent = cpu.spent(service, lambda: requests.extend(step for _ in range(cycles) for step in _cycle(api, size)))
        idle = [milliseconds(lambda: api.call("GET", "/v1/volumes?limit=1")) for _ in range(cycles)]
    phases = _phases(service, requests)
    fsync = median(fsync_latency(service.home))
    return [_by_step(phases), _beside(median(idle), fsync, spent, cycles)]


Request = tuple[str, UUID, float, float]


def _cycle(api: Api, size: int) -> list[Request]:
    """One cycle: the kind of each operation, its resource, and when it was asked for and answered."""
    done: list[Request] = []

    def timed(kind: str, act: Callable[[], str | None], resource: str = "") -> str:
        began = time.time()
        made = act()
        done.append((kind, UUID(made or resource), began, time.time()))
        return made or resource

    volume = timed("volume.create", lambda: api.create_volume(size))
    attachment = timed("attachment.attach", lambda: str(api.attach(volume)["id"]))
    timed("attachment.detach", lambda: api.detach(attachment), attachment)
    timed("volume.delete", lambda: api.delete_volume(volume), volume)
    return done


def _phases(service: Service, requests: list[Request]) -> Trace:
    """Milliseconds of each phase, by kind of operation."""
    database = Database(service.settings.database_url)
    found: Trace = defaultdict(list)
    with database.read() as session:
        rows = {(row.kind, row.resource_id): row for row in session.scalars(select(Operation))}
    database.close()
    for kind, resource, began, ended in requests:
        row = rows[kind, resource]
        assert row.started_at is not None
        assert row.finished_at is not None
        times = [began, *(at.timestamp() for at in (row.created_at, row.started_at, row.finished_at)), ended]
        found[kind].append(tuple((after - before) * 1000 for before, after in pairwise(times)))
    return found


def _by_step(phases: Trace) -> Table:
    columns = ("one client, ms (medians)", *PHASES, "whole", "of the cycle")
    table = Table("Where a cycle's time goes", columns, notes=[line.strip() for line in _LEGEND])
    medians = {kind: [median(phase) for phase in zip(*traces, strict=True)] for kind, traces in phases.items()}
    whole = sum(sum(phase) for phase in medians.values())
    for kind, values in medians.items():
        table.add(kind, *values, sum(values), f"{sum(values) / whole:.0%}")
    columns_of = list(zip(*medians.values(), strict=True))
    table.add("cycle", *(sum(column) for column in columns_of), whole, "100%")
    return table


_LEGEND = (
    "accept: HTTP, sign-in, checks, the write lock. wake: commit of the intention, notification.",
    "act: the claim and its commit, hand-over to a thread, the outside act. settle: commit of the result, "
    "notification, answer.",
)


def _beside(request: float, fsync: float, spent: dict[str, float], cycles: int) -> Table:
    """What these times are made of: the disk's latency, and the CPU of each process."""
    table = Table("Beside it", ("one client", "ms"))
    table.add("a request that only reads, median", request)
    table.add("4 KiB appended and synced, median", fsync)
    for part, milliseconds_spent in spent.items():
        table.add(f"CPU of the {part}, per cycle", milliseconds_spent / cycles)
    return table
