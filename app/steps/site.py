"""Operations on the site as a whole."""

from __future__ import annotations

import json
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.orm import Session

from app import reconcile as reconciling
from app.db import change
from app.events import SYSTEM, record
from app.models import Operation
from app.steps.job import Again, Job, Settle
from iscsi.target import TargetUnavailable

#: What site-wide operations occupy: one of a kind at a time.
SITE = UUID(int=0)


def reconcile(job: Job) -> Settle:
    """The drift (and, unless it is a dry run, its convergence); told in the operation's message as JSON."""
    dry_run = bool(job.operation.parameters.get("dry_run"))
    try:
        drifts = reconciling.look(job.outside) if dry_run else reconciling.converge(job.outside)
    except TargetUnavailable as error:
        raise Again(0.5, f"waiting for the target: {error}") from error
    report = json.dumps([drift.document() for drift in drifts])

    def settle(session: Session) -> None:
        told = update(Operation).where(Operation.id == job.operation.id).values(message=report)
        change(session, told)
        record(session, SYSTEM, "site.reconciled", drifts=len(drifts), dry_run=dry_run)

    return settle


def reconcile_failed(session: Session, operation: Operation, error: Exception) -> None:
    record(session, SYSTEM, "site.reconcile-failed", cause=str(error))
