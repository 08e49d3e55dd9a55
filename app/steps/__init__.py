"""The outside acts of each operation: the only modules of the service that know pools, targets and
the cache of images.

A step can be repeated: "already there" and "already gone" are success. It runs under a file lock of its volume and
lane whose descriptor every child inherits, and looks once more, with the lock in hand, whether the operation is still
its own. What became of it is returned as a function and committed together with the operation's end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.models import Operation
from app.steps import attachments, fetching, from_image, images, site, snapshots, uploads, volumes
from app.steps.job import Again, Job, Settle

Failed = Callable[[Session, Operation, Exception], None]


@dataclass(frozen=True)
class Handler:
    """`run` acts and returns what to commit; `failed` says what becomes of the resource when it cannot be done.

    `undo` takes away outside what a cancelled operation may have made already, before `failed` is committed.
    """

    run: Callable[[Job], Settle]
    failed: Failed
    undo: Callable[[Job], None] | None = None


HANDLERS: dict[str, Handler] = {
    "volume.create": Handler(volumes.create, volumes.create_failed),
    "volume.clone": Handler(volumes.clone, volumes.clone_failed, volumes.remove_copy),
    "volume.grow": Handler(volumes.grow, volumes.grow_failed),
    "volume.revert": Handler(volumes.revert, volumes.revert_failed),
    "volume.delete": Handler(volumes.delete, volumes.delete_failed),
    "volume.reset": Handler(volumes.reset, volumes.reset_failed),
    "snapshot.create": Handler(snapshots.create, snapshots.create_failed, snapshots.remove_copy),
    "snapshot.delete": Handler(snapshots.delete, snapshots.delete_failed),
    "volume.from-image": Handler(from_image.from_image, from_image.from_image_failed, volumes.remove_copy),
    "image.fetch": Handler(fetching.fetch, fetching.fetch_failed),
    "image.from-volume": Handler(images.from_volume, images.from_volume_failed, images.remove_clone),
    "image.commit": Handler(uploads.commit, uploads.commit_failed),
    "image.join": Handler(images.join, images.join_failed),
    "image.judge": Handler(images.judge, images.judge_failed),
    "image.scrub": Handler(images.scrub, images.scrub_failed),
    "image.delete": Handler(images.delete, images.delete_failed),
    "attachment.attach": Handler(attachments.attach, attachments.attach_failed),
    "attachment.detach": Handler(attachments.detach, attachments.detach_failed),
    "site.reconcile": Handler(site.reconcile, site.reconcile_failed),
}

__all__ = ["HANDLERS", "Again", "Handler", "Job", "Settle"]
