"""Acts that die in the middle: how they are interrupted, and what must be true when their successor has ended them."""

from __future__ import annotations

import signal
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from app.db import Database
from tests.support import invariants
from tests.support.service import RunningService, wait_until
from tests.support.shim import Brake

#: The worker is killed; it is stopped, and killed by its supervisor; all is killed, tgtd too, and started again.
Death = Literal["killed", "stopped", "all killed"]


ONE, TWO = "iqn.2026-11.org.example:one", "iqn.2026-11.org.example:two"
MIB = 1 << 20
SIZE = 64 * MIB
#: Puts on the brake of that name.
PutOn = Callable[[str], Brake]
OF_THE_WORKER = pytest.mark.parametrize("death", ["killed", "stopped"])
OF_ANYTHING = pytest.mark.parametrize("death", ["killed", "stopped", "all killed"])


@contextmanager
def interrupted(
    service: RunningService, brake: Brake, death: Death, reached: Callable[[], object] | None = None
) -> Iterator[None]:
    """What the block asks for begins, and when it is `reached` (or else: when the brake holds it) there is a death.

    The brake goes off only after it: nothing more comes of the act by who began it.
    """
    worker = service.worker_pid()
    yield
    wait_until(lambda: _caught(service, worker, reached or brake.holds), 60, "the act")
    if death == "all killed":
        service.kill_everything()
        assert service.pids() == []
        brake.off()
        service.start()
        return
    if death == "killed":
        service.kill(worker)
    brake.off()
    wait_until(lambda: service.worker_pid() != worker, 60, "another worker")


def _caught(service: RunningService, worker: int, reached: Callable[[], object]) -> bool:
    """Look while the worker stands still, and leave it so if it is where it is to die: it gets no further."""
    service.kill(worker, signal.SIGSTOP)
    wait_until(lambda: _stands_still(worker), what="the stop")  # not all of its threads stop at once
    if reached():
        return True
    service.kill(worker, signal.SIGCONT)
    return False


def _stands_still(pid: int) -> bool:
    states = (stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat"))
    return all(state == "T" for state in states)


def done_once(service: RunningService, operation: str, told: str, pool: Path) -> str:
    """The operation succeeded at its second attempt and was told once; nothing is left over. The resource's id."""
    ended = service.admin.wait_operation(operation)
    assert (ended["state"], ended["error"]) == ("succeeded", None)
    assert standing(service, operation) == ("succeeded", 2)
    resource = str(ended["resource"]["id"])
    assert len(service.admin.events(told, resource)) == 1
    assert list((pool / "staging").iterdir()) == []
    with closing(Database(f"sqlite:///{service.home}/stratus.db")) as database:
        invariants.check(database, idle=True)
    service.storage("verify-events")
    return resource


def standing(service: RunningService, operation: str) -> tuple[str, int]:
    """The operation's state, and how often it was begun. Asks nobody: a worker that stands still may hold locks."""
    with closing(sqlite3.connect(f"file:{service.home}/stratus.db?mode=ro", uri=True)) as database:
        query = "SELECT state, attempt FROM operations WHERE id = ?"
        state, attempt = database.execute(query, [uuid.UUID(operation).hex]).fetchone()
    return str(state), int(attempt)


def used(service: RunningService) -> tuple[int, int]:
    """The bytes and the records that the admin is charged for."""
    quota: dict[str, Any] = service.admin.show("/v1/quotas/admin")
    return quota["used_size"], quota["used_count"]
