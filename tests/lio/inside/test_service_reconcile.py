"""tests/end_to_end/test_reconcile.py on LIO, with the kernel in the hands of somebody else.

What stays tgt's own: rights that are bound to a target one by one (here they are layers of an ACL, and test_behaviour
alters each), and the number of a target that somebody else has taken (LIO has none).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.config import read_effective
from iscsi.lio import LioTarget
from iscsi.target import Connection, Credentials, Export
from tests.end_to_end import test_reconcile as tgt
from tests.end_to_end.test_reconcile import restricted as restricted
from tests.end_to_end.test_reconcile import service as service
from tests.end_to_end.test_reconcile import volume as volume
from tests.lio.inside.lio_service import on_lio as on_lio
from tests.support.service import RunningService, wait_until


@dataclass
class BehindItsBack:
    """As tgt's: LIO, changed without the service."""

    service: RunningService

    def target(self, prefix: str = "") -> LioTarget:
        settings = read_effective(self.service.home / "run" / "effective.json")
        target = LioTarget(
            prefix or settings.iscsi.iqn_prefix, [("127.0.0.1", 3269)], self.service.home / "theirs.lock"
        )
        if prefix:
            target.open_portals()
        return target

    def state(self, volume: str) -> Any:
        return next((each for each in self.target().inventory() if each.volume_id == UUID(volume)), None)

    def remove(self, volume: str) -> None:
        target = self.target()
        wait_until(lambda: not target.drain(UUID(volume)), what="the end of the sessions")
        target.remove(UUID(volume))

    def make(self, path: Path, tid: int, prefix: str = "") -> UUID:
        path.touch()
        os.truncate(path, tgt.MIB)
        connection = Connection(tgt.INTRUDER, Credentials("somebody", "a-secret-of-theirs"))
        export = Export(uuid4(), tid, path, tgt.MIB, False, (connection,))
        self.target(prefix).ensure_export(export)
        return export.volume_id


@pytest.fixture
def behind(service: RunningService) -> BehindItsBack:
    return BehindItsBack(service)


def test_a_foreign_target_is_told_with_its_backstore_and_left_alone(
    service: RunningService, behind: BehindItsBack, tmp_path: Path
) -> None:
    """As tgt's, where a target has nothing beside it."""
    theirs = behind.make(tmp_path / "foreign.raw", 902, tgt.FOREIGN)
    try:
        target, backstore = tgt.reconcile(service, "--dry-run").splitlines()
        assert target == f"foreign  {'-':36} {tgt.FOREIGN}:{theirs} is not ours -> leave it alone"
        assert backstore.startswith(f"foreign  {'-':36} iblock_")
        assert backstore.endswith(f"/{tgt.FOREIGN}:{theirs} is not ours -> leave it alone")
        assert tgt.reconcile(service).splitlines() == [target, backstore]
        assert behind.target(tgt.FOREIGN).inventory()[0].complete
    finally:
        behind.target(tgt.FOREIGN).remove(theirs)


test_nothing_is_said_when_nothing_differs = tgt.test_nothing_is_said_when_nothing_differs
test_a_target_that_was_deleted = tgt.test_a_target_that_was_deleted_is_made_again_with_the_same_secret
test_a_target_that_nobody_asked_for_is_removed = tgt.test_a_target_that_nobody_asked_for_is_removed
test_bytes_without_a_record = tgt.test_bytes_without_a_record_are_told_and_kept
test_a_volume_without_its_bytes = tgt.test_a_volume_without_its_bytes_is_in_error_until_they_are_back
test_a_volume_that_shrank = tgt.test_a_volume_that_shrank_is_in_error_until_it_is_whole
test_lost_bytes = tgt.test_an_attached_volume_that_lost_its_bytes_and_target_is_whole_again_once_they_are_back
test_used_from_two_places = tgt.test_a_connection_used_from_two_places_is_told_and_then_fenced
test_one_session_is_never_told = tgt.test_one_session_is_never_told
test_direct_attachments = tgt.test_direct_attachments_have_their_own_portal_and_networks
test_nodes_use_the_sites_portal = tgt.test_nodes_use_the_sites_portal_from_anywhere
