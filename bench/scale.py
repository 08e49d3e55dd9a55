"""Whether a page costs the same among 100,000 volumes as among 100.

A service for each number of volumes, all up at once, asked in turn: what disturbs the machine disturbs all of them.
Every service shows the same number of rows to each question, so that only what it must not look at differs.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import insert, select

from app.config import load
from app.db import Database
from app.ids import new_id
from app.models import Group, GroupMember, Share, User, Volume
from app.paging import encode_cursor
from bench.report import Table, milliseconds, percentile
from bench.service import Api, Service, running

COUNTS = (100, 10_000, 100_000)
#: Of each kind that the user with few volumes sees: their own, public ones, shared with their group. Also: in error.
FEW = 5
OTHERS = 10
SIZE = 1 << 30
PAGE = 20
#: Rows written at once: the service under way keeps its turns at the database between two of them.
BATCH = 20_000
#: What looks at every volume by design is not what is asked here; one process, so that each site has the same cache.
QUIET = {"STRATUS_WORKER__RECONCILE_INTERVAL": "86400", "STRATUS_SERVER__PROCESSES": "1"}

Ask = Callable[[], object]
Timings = dict[str, dict[int, list[float]]]


@dataclass
class Site:
    """A service with `count` volumes and a connection for the admin and for the user with few of them."""

    count: int
    admin: Api
    user: Api
    own: UUID
    another: UUID
    cursor: str
    attachable: str


def run(work: Path, *, quick: bool) -> list[Table]:
    counts = COUNTS[:2] if quick else COUNTS
    with ExitStack() as stack:
        sites = [_site(stack, work / f"home-{count}", count) for count in counts]
        timings: Timings = defaultdict(lambda: defaultdict(list))
        for _ in range(10 if quick else 200):
            for site in sites:
                _ask_all(site, timings)
        for _ in range(3 if quick else 40):
            for site in sites:
                _attach(site, timings)
    return [_table(timings, counts)]


def _ask_all(site: Site, timings: Timings) -> None:
    for name, ask in _questions(site).items():
        timings[name][site.count].append(milliseconds(ask))


def _questions(site: Site) -> dict[str, Ask]:
    admin, user = site.admin, site.user

    def listing(api: Api, query: str = "") -> Ask:
        return lambda: api.call("GET", f"/v1/volumes?limit={PAGE}{query}")

    def showing(api: Api, volume: UUID) -> Ask:
        return lambda: api.call("GET", f"/v1/volumes/{volume}")

    return {
        "list, admin": listing(admin),
        "list, admin, from the middle": listing(admin, f"&next={site.cursor}"),
        "list, admin, by a rare name": listing(admin, "&name=few-2"),
        "list, admin, by a common name": listing(admin, "&name=data"),
        "list, admin, by a rare state": listing(admin, "&state=error"),
        "list, admin, by a common state": listing(admin, "&state=available"),
        "list, admin, by owner of few": listing(admin, "&owner=few"),
        "list, user of few": listing(user),
        "list, user of few, by a rare name": listing(user, "&name=few-2"),
        "list, user of few, by a common name": listing(user, "&name=data"),
        "list, user of few, by a rare state": listing(user, "&state=error"),
        "list, user of few, by a common state": listing(user, "&state=available"),
        "show, admin": showing(admin, site.another),
        "show, user of few": showing(user, site.own),
    }


def _attach(site: Site, timings: Timings) -> None:
    attachments: list[str] = []
    attach = milliseconds(lambda: attachments.append(site.admin.attach(site.attachable)["id"]))
    detach = milliseconds(lambda: site.admin.detach(attachments[0]))
    timings["attach"][site.count].append(attach)
    timings["detach"][site.count].append(detach)


def _table(timings: Timings, counts: tuple[int, ...]) -> Table:
    columns = ["ms", *(f"{count:,}: {which}" for count in counts for which in ("p50", "p95"))]
    table = Table("Latency by the number of volumes", [*columns, f"p50: {counts[-1]:,} / {counts[0]:,}"])
    for name, by_count in timings.items():
        shown = [percentile(by_count[count], percent) for count in counts for percent in (50, 95)]
        table.add(name, *shown, shown[-2] / shown[0])
    table.notes += [
        f"Pages of {PAGE}. A service for each number, all up at once and asked in turn. The user of few owns {FEW} "
        f"volumes, sees {FEW + PAGE} that are shared or public, and none of the others.",
        "Each service runs one API process instead of the configured number, and none reconciles meanwhile: that looks "
        "at every volume, and its cost is not in these figures.",
        "Aim: a page at most 1.5 times as long among the most volumes as among the fewest.",
    ]
    return table


# ---------------------------------------------------------------- sites


def _site(stack: ExitStack, home: Path, count: int) -> Site:
    service = stack.enter_context(running(home, **QUIET))
    admin = stack.enter_context(service.api())
    user = stack.enter_context(service.api(service.user_token("few")))
    for number in range(OTHERS):
        service.user_token(f"other-{number}")
    attachable = admin.create_volume(1 << 20)
    ids = _fill(service, count)
    return Site(
        count=count,
        admin=admin,
        user=user,
        own=ids[0],
        another=ids[count // 2],
        cursor=encode_cursor(sorted(ids)[count // 2]),
        attachable=attachable,
    )


def _fill(service: Service, count: int) -> list[UUID]:
    """Write `count` volumes straight into the tables; the user's own come first in the returned ids."""
    database = Database(load(service.home).database_url)
    with database.read() as session:
        owners = dict(session.execute(select(User.name, User.id)).tuples().all())
    few = owners.pop("few")
    rows = list(_rows(count, few, [owners[f"other-{number}"] for number in range(OTHERS)]))
    for start in range(0, count, BATCH):
        with database.write() as session:
            session.execute(insert(Volume), rows[start : start + BATCH])
    with database.write() as session:
        group = Group(id=new_id(), name="group", created_at=dt.datetime.now(dt.UTC))
        session.add(group)
        session.flush()
        session.add(GroupMember(group_id=group.id, user_id=few))
        shared = [row["id"] for row in rows if row["name"].startswith("shared")]
        session.add_all(Share(volume_id=volume, group_id=group.id, mode="ro") for volume in shared)
    database.close()
    return [row["id"] for row in sorted(rows, key=lambda row: row["owner_id"] != few)]


def _rows(count: int, few: UUID, others: list[UUID]) -> Iterator[dict[str, Any]]:
    """Volumes of many owners, every other one named alike; the special ones are spread evenly among them."""
    kinds = ["few"] * FEW + ["shared"] * FEW + ["public"] * PAGE + ["error"] * FEW
    special = {count * place // len(kinds): f"{kind}-{place}" for place, kind in enumerate(kinds)}
    moment = dt.datetime.now(dt.UTC)
    for number in range(count):
        name = special.get(number, f"volume-{number}")
        yield {
            "id": new_id(),
            "name": "data" if name.startswith("volume") and number % 2 else name,
            "size": SIZE,
            "state": "error" if name.startswith("error") else "available",
            "owner_id": few if name.startswith("few") else others[number % len(others)],
            "visibility": "public" if name.startswith("public") else "private",
            "pool": "default",
            "readers": 0,
            "tid": 1_000_000 + number,
            "version": 1,
            "created_at": moment,
            "updated_at": moment,
        }
