"""Workers that die at any moment: `python -m tests.support.crashing_workers URL WORKERS KILLS SEED`.

Forks WORKERS processes that claim operations, act and finish them, kills KILLS of them by SIGKILL wherever they are,
starts others in their place, and ends when no operation is open. What a worker does is written to the database as
events: `began` in a transaction of its own, `ended` in the one that ends the operation.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from app import operations
from app.db import Database
from app.events import Actor, record
from app.models import Operation
from app.operations import Lost

LEASE = 1.0


def work(url: str, number: int) -> None:
    """One worker, until no operation is open."""
    database, me = Database(url, connections=2), f"host-{number}:{os.getpid()}:0"
    dice = random.Random(os.getpid())
    while is_open(database):
        operation = None
        for lane in ("data", "export"):
            try:
                operation = operations.claim(database, me, lane, LEASE)
                if operation is not None:
                    act(database, operation, dice)
            except (Lost, OperationalError):
                continue
        if operation is None:
            time.sleep(0.01)
    os._exit(0)


def act(database: Database, operation: Operation, dice: random.Random) -> None:
    begin(database, operation)
    time.sleep(dice.random() * 0.02)
    if dice.random() < 0.05:
        time.sleep(LEASE * 1.5)  # swapped out: somebody else has it now, and this must change nothing
    with database.write() as session:
        record(session, Actor("worker"), "ended", ("operation", operation.id), fence=operation.fence)
        operations.finish(session, operation, "succeeded")


def begin(database: Database, operation: Operation) -> None:
    with database.write() as session:
        operations.guarded(session, operation, progress=1)
        record(session, Actor("worker"), "began", ("operation", operation.id), fence=operation.fence)


def is_open(database: Database) -> bool:
    with database.read() as session:
        query = select(Operation.id).where(Operation.state.in_(operations.OPEN)).limit(1)
        return session.scalar(query) is not None


def start(url: str, number: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work(url, number)
        finally:
            os._exit(1)
    return pid


def main(url: str, workers: int, kills: int, seed: int) -> None:
    dice = random.Random(seed)
    alive = {start(url, number) for number in range(workers)}
    for number in range(workers, workers + kills):
        time.sleep(dice.random() * 0.1)
        victim = dice.choice(sorted(alive))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        alive.remove(victim)
        alive.add(start(url, number))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in alive]
    assert codes == [0] * workers, codes


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
