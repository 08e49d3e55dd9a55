"""A home that exports by another target, or under another prefix, than before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lio.inside.conftest import CONFIGFS, wipe_lio
from tests.support.service import RunningService, initiator_of, running

ONE, TWO = "iqn.2026-11.org.example:one", "iqn.2026-11.org.example:two"


@pytest.fixture
def service(lio: Path, xfs: Path, tmp_path: Path) -> Iterator[RunningService]:
    pool = xfs / "kept"
    pool.mkdir()
    environment = {
        "STRATUS_ISCSI__TARGET": "lio",
        "STRATUS_POOLS__DEFAULT": json.dumps({"path": str(pool)}),
        "STRATUS_SERVER__PROCESSES": "1",
        "STRATUS_WORKER__LEASE": "15",
    }
    with running(tmp_path / "home", environment, ("--keep-target",)) as started:
        yield started
    wipe_lio()


def exports() -> list[str]:
    return [path.name for path in (CONFIGFS / "target/iscsi").glob("iqn.*")]


def test_what_the_earlier_one_served_is_ended_before_the_new_one_serves(service: RunningService) -> None:
    attachment, one = service.attached(ONE)
    with one.bare() as session:
        assert service.stop() == 0
        assert exports() == [one.iqn]  # kept, as it was told
        assert session.command(b"\x00", 0) == b""
        service.environment["STRATUS_ISCSI__TARGET"] = "tgt"
        service.start()
        assert exports() == []
        with pytest.raises((OSError, AssertionError)):
            session.command(b"\x00", 0)
    assert one.login_error() is None  # by tgt now, under the same name
    service.admin.detach(attachment["id"])
    two = initiator_of(service.admin.attach(attachment["volume_id"], TWO))
    assert two.login_error() is None
    assert one.login_error() is not None
