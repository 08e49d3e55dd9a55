"""The one hand that touches storage: claims operations and runs their steps, many volumes at once.

    bus ──wakes──▶ a dispatcher per lane ──claims──▶ threads ──act, then commit──▶ bus ──wakes──▶ who waits

Beside that: a beat that renews leases, the keeper of the target (`app.keeper`), and housekeeping (`app.housekeeping`).
A notification that is lost costs a poll; a worker that is lost costs a lease.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import structlog
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from app import operations
from app.models import Operation, WorkerBeat
from app.notify import DONE, WORK, Bus
from app.operations import EVERYTHING, KINDS, LANES, Cancelled, Lost, finish, put_back, queued_behind
from app.outside import Outside
from app.states import now
from app.steps import HANDLERS
from app.steps.job import Again, CloneNeedsDetach, Elsewhere, Job, Refusal, Settle, SnapshotNeedsDetach, Vanished
from blockdev.command import CommandError
from imagecache.errors import CacheUnusable, ImageError, Unreachable
from iscsi.target import TargetError, TargetLimit, TargetUnavailable
from pools import BackingMissing, PoolError, PoolFailed, PoolFull, PoolUnusable, SizeMismatch, SizeTooLarge

log = structlog.get_logger()
#: Looks for work that nobody announced, seconds.
POLL = 1.0
#: What is worth trying again by itself, and how often, before a client is told.
TRANSIENT = (
    PoolUnusable,
    PoolFailed,
    OperationalError,
    IntegrityError,
    CommandError,
    TargetUnavailable,
    CacheUnusable,
    OSError,
)
ATTEMPTS = 5

CODES: tuple[tuple[type[Exception], str], ...] = (
    (PoolFull, "pool-full"),
    (PoolUnusable, "pool-unusable"),
    (BackingMissing, "backing-missing"),
    (SizeMismatch, "size-mismatch"),
    (SizeTooLarge, "size-too-large"),
    (PoolError, "pool-failed"),
    (TargetLimit, "target-limit"),
    (TargetUnavailable, "target-unavailable"),
    (TargetError, "target-failed"),
    (SnapshotNeedsDetach, "snapshot-needs-detach"),
    (CloneNeedsDetach, "clone-needs-detach"),
    (Elsewhere, "changed-meanwhile"),
    (Cancelled, "cancelled"),
    (OSError, "io-error"),
)


#: Of a server that does not answer a fetch has asked often already.
FETCH_ATTEMPTS = 3


def is_transient(error: Exception, attempt: int) -> bool:
    """Whether to try again, after that many tries, what failed like this."""
    if isinstance(error, Unreachable):
        final = error.status is not None and 400 <= error.status < 500 and error.status not in (408, 425, 429)
        return not final and attempt < FETCH_ATTEMPTS
    return isinstance(error, TRANSIENT) and attempt < ATTEMPTS


def code_of(error: Exception) -> str:
    if isinstance(error, ImageError | Refusal):
        return error.code
    return next((code for kind, code in CODES if isinstance(error, kind)), "internal-error")


def told(error: Exception) -> str:
    """What a client may read of it: what we did not foresee (a statement with its values, say) is for the log only."""
    if code_of(error) == "internal-error":
        return "Something went wrong here; the log of the worker says what."
    return error.strerror or "I/O error" if isinstance(error, OSError) else str(error)


def host_name() -> str:
    """This host as the database knows it: worker names begin with it, and have to fit their column."""
    return socket.gethostname()[:32]


class Worker:
    def __init__(self, outside: Outside, bus: Bus) -> None:
        self.outside = outside
        self._bus = bus
        self._host = host_name()
        self.name = f"{self._host}:{os.getpid()}:{time.time_ns():x}"
        self.stopping = threading.Event()
        self.ready = threading.Event()
        self._wake = {lane: threading.Event() for lane in LANES}
        self._in_hand: set[Operation] = set()

    # ------------------------------------------------------------ threads

    def start(self) -> list[threading.Thread]:
        """Take over what an earlier worker of this host left, then begin to claim."""
        taken = operations.take_over(self.outside.database, self._host)
        if taken:
            log.info("took over operations of an earlier worker", count=taken)
        jobs = [("bus", self._listen), ("beat", self._beat)]
        threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in jobs]
        threads += [threading.Thread(target=self._dispatch, args=(lane,), name=lane) for lane in LANES]
        for thread in threads:
            thread.start()
        return threads

    def _listen(self) -> None:
        for lane in self._bus.listen(WORK, POLL, self.stopping):
            for name in (lane,) if lane in self._wake else LANES:
                self._wake[name].set()

    def _beat(self) -> None:
        """Lease and liveness, also as a file whose age the supervisor watches."""
        settings = self.outside.settings
        beat_file, fresh = settings.run_dir / "worker.beat", settings.run_dir / "worker.beat.new"
        pause = 0.0  # the first one at once: one that hangs after it is missed as soon as any other
        while not self.stopping.wait(pause):
            pause = min(1.0, settings.worker.lease / 5)
            # Monotonic time, which all processes of a host share and no clock adjustment moves. Renamed into its place:
            # who is stopped in the middle of writing leaves no empty file, which would tell nothing for ever.
            fresh.write_text(str(time.monotonic()))
            fresh.rename(beat_file)
            try:
                self.beat()
            except SQLAlchemyError as error:
                log.warning("beat missed", cause=str(error))

    def beat(self) -> None:
        in_hand = {operation.id for operation in self._in_hand.copy()}
        with self.outside.database.write(durable=False) as session:
            operations.renew(session, self.name, in_hand, self.outside.settings.worker.lease)
            session.merge(WorkerBeat(host=self._host, pid=os.getpid(), ready=self.ready.is_set(), beat_at=now()))

    def _dispatch(self, lane: str) -> None:
        width = self._width(lane)
        free = threading.Semaphore(width)
        with ThreadPoolExecutor(width, thread_name_prefix=lane) as pool:
            while not self.stopping.is_set():
                self._wake[lane].wait(POLL)
                free.acquire()
                self._wake[lane].clear()
                operation = self._claim(lane)
                if operation is None:
                    free.release()
                    continue
                pool.submit(self._run, operation).add_done_callback(lambda _: free.release())

    def _width(self, lane: str) -> int:
        settings = self.outside.settings
        return settings.images.fetches if lane == "image" else settings.worker.threads

    def _claim(self, lane: str) -> Operation | None:
        if lane == "export" and not self.ready.wait(POLL):  # without its target a volume can still be made and copied
            self._wake[lane].set()
            return None
        database, lease = self.outside.database, self.outside.settings.worker.lease
        share = max(1, self._width(lane) - 1) if lane == "image" else EVERYTHING
        try:
            waiting = operations.claimable(database, lane, share)
            if waiting > 1:
                self._wake[lane].set()  # look again, whatever becomes of this one
            return operations.claim(database, self.name, lane, lease, share) if waiting else None
        except SQLAlchemyError as error:
            log.warning("claim failed", cause=str(error))
            return None

    # ------------------------------------------------------------ one operation

    def _run(self, operation: Operation) -> None:
        """The edge of a thread: whatever happens is written to the operation, or to the log."""
        self._in_hand.add(operation)
        try:
            self.work(operation)
        except Lost:
            log.warning("operation lost to another worker", operation=str(operation.id))
        except Exception:
            log.exception("operation left for its lease to end", operation=str(operation.id), kind=operation.kind)
        finally:
            self._in_hand.discard(operation)

    def work(self, operation: Operation) -> None:
        """Act, and commit what became of it together with the operation's end."""
        job = Job(operation, self.outside, self.stopping)
        if operation.kind not in HANDLERS:  # of a newer version: it would come back for ever
            unknown = Refusal("unknown-kind", f"This version of the service knows no {operation.kind}.")
            self._end(operation, "failed", lambda session: None, unknown)
            return
        try:
            settle = HANDLERS[operation.kind].run(job)
            self._end(operation, "succeeded", settle)
        except Again as again:
            self._later(operation, again.delay, again.message, failed=False)
        except Elsewhere as error:
            self._end(
                operation, "failed" if KINDS[operation.kind].ends_it else "cancelled", lambda session: None, error
            )
        except Vanished:
            state = "succeeded" if KINDS[operation.kind].ends_it else "cancelled"
            self._end(operation, state, lambda session: None, Cancelled("There was nothing left to do."))
        except Cancelled:
            self._cancel(job)
        except Lost:
            raise
        except Exception as error:
            self._retry_or_fail(job, error)

    def _end(self, operation: Operation, state: str, settle: Settle, error: Exception | None = None) -> None:
        with self.outside.database.write() as session:
            if state == "succeeded" or error is None:
                finish(session, operation, state)
            else:
                finish(session, operation, state, code=code_of(error), detail=told(error))
            settle(session)
            others = queued_behind(session, operation)
        if others:
            self._wake[operation.lane].set()
        if operation.lane == "image":
            self._wake["data"].set()  # volumes wait for images
        self._bus.announce(DONE, str(operation.id))

    def _later(self, operation: Operation, delay: float, message: str, *, failed: bool) -> None:
        with self.outside.database.write() as session:
            put_back(session, operation, delay, message, failed=failed)
        self._wake[operation.lane].set()  # a fence that waited behind it need not wait for its next try
        timer = threading.Timer(delay, self._wake[operation.lane].set)
        timer.daemon = True
        timer.start()

    def _retry_or_fail(self, job: Job, error: Exception) -> None:
        """A fence is never given up; other work is, when it cannot succeed or did not often enough."""
        operation = job.operation
        log.warning("operation failed", kind=operation.kind, operation=str(operation.id), attempt=operation.attempt,
                    exc_info=error)  # fmt: skip
        fence = operation.kind == "attachment.detach"
        if fence or is_transient(error, operation.attempt):
            delay = min(0.1 * 2 ** min(operation.attempt, 10), 10.0)
            self._later(operation, delay, f"trying again: {told(error)}", failed=True)
        else:
            self._end(
                operation, "failed", lambda session: HANDLERS[operation.kind].failed(session, operation, error), error
            )

    def _cancel(self, job: Job) -> None:
        """What was made already goes first, then its record: a cancelled copy leaves nothing."""
        operation, handler = job.operation, HANDLERS[job.operation.kind]
        if handler.undo is not None:
            with self.outside.lock(operation.subject_id, operation.lane):
                handler.undo(job)
        error = Cancelled("It was cancelled on request.")
        self._end(operation, "cancelled", lambda session: handler.failed(session, operation, error), error)
