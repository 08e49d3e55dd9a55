"""A volume is as good a SCSI device as tgt itself makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iscsi.tgt_daemon import TgtDaemon
from tests.end_to_end.conformance import PASSED, Results, read_baseline, run_suites
from tests.end_to_end.conftest import Serve
from tests.support.initiator import Initiator
from tests.support.service import initiator_of

BASELINE = read_baseline(Path(__file__).with_name("iscsi-test-cu.baseline"))
INITIATOR = "iqn.2026-11.org.example:conformance"
SIZE = 1 << 30
WIDTH = 4


def test_a_volume_passes_every_test_that_plain_tgt_passes(serve: Serve) -> None:
    service = serve(STRATUS_ATTACHMENTS__MAX_SESSIONS="16")
    volumes = [service.admin.make_volume(SIZE) for _ in range(WIDTH)]
    results = run_suites([initiator_of(service.admin.attach(volume["id"], INITIATOR)) for volume in volumes])
    expected = {test for test, plain in BASELINE.items() if PASSED in plain}
    assert len(expected) > 150
    assert {test: results.get(test) for test in expected if results.get(test) != PASSED} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("column", "parameters"), [(0, ""), (1, "thin_provisioning=1")], ids=["thick", "thin"])
def test_the_baseline_is_what_plain_tgt_gives(tmp_path: Path, column: int, parameters: str) -> None:
    assert _plain_tgt(tmp_path, parameters) == {test: plain[column] for test, plain in BASELINE.items()}


def _plain_tgt(directory: Path, parameters: str) -> Results:
    daemon = TgtDaemon(directory, directory / "log", control=9)
    daemon.start()
    try:
        portal = daemon.open_portal("127.0.0.1:0")
        return run_suites([_plain_lun(daemon, directory, portal, tid, parameters) for tid in range(1, WIDTH + 1)])
    finally:
        daemon.kill()


def _plain_lun(daemon: TgtDaemon, directory: Path, portal: str, tid: int, parameters: str) -> Initiator:
    backing, iqn = directory / f"{tid}.raw", f"iqn.2026-11.org.example:plain{tid}"
    backing.touch()
    os.truncate(backing, SIZE)
    daemon.ipc.create_target(tid, iqn)
    daemon.ipc.create_lun(tid, backing)
    if parameters:
        daemon.ipc.update_lun(tid, parameters)
    daemon.ipc.bind_initiator(tid, INITIATOR)
    return Initiator(portal, iqn, INITIATOR)
