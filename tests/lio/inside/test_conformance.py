"""A volume is as good a SCSI device as LIO itself makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import rtslib_fb as rtslib

from blockdev import loop
from tests.end_to_end.conformance import PASSED, SKIPPED, Results, read_baseline, run_suites
from tests.lio.inside.lio_house import House
from tests.support.initiator import Initiator
from tests.support.thinpools import ThinPool, lvm

BASELINE = read_baseline(Path(__file__).with_name("iscsi-test-cu.baseline"))
INITIATOR = "iqn.2026-11.org.example:conformance"
PORTAL = ("127.0.0.1", 3261)
SIZE = 1 << 30
WIDTH = 4
VARIES = "varies"
#: Third-party copies, which a volume refuses and plain LIO makes: a test of them that finds none says "skipped".
COPIES = "ExtendedCopy."


@pytest.fixture(params=["file", pytest.param("thin volume", marks=pytest.mark.slow)])
def volumes(request: pytest.FixtureRequest, house: House, pool_group: ThinPool) -> Iterator[list[Initiator]]:
    if request.param == "file":
        yield [house.initiator(house.exported(size=SIZE)) for _ in range(WIDTH)]
        return
    names = [f"conformance{number}" for number in range(WIDTH)]
    for name in names:
        lvm("lvcreate", "--thin", "--virtualsize", f"{SIZE}b", "--name", name, str(pool_group.path))
    paths = [Path("/dev", pool_group.group, name) for name in names]
    yield [house.initiator(house.exported(size=SIZE, path=path)) for path in paths]
    house.clear()
    lvm("lvremove", "--yes", *(f"{pool_group.group}/{name}" for name in names))


def test_a_volume_passes_every_test_that_plain_lio_passes(volumes: list[Initiator]) -> None:
    results = run_suites(volumes)
    passed = {test for test, (_, with_discards) in BASELINE.items() if with_discards == PASSED}
    expected = {test: SKIPPED if test.startswith(COPIES) else PASSED for test in passed}
    assert len(expected) > 100
    assert {test: results.get(test) for test in expected if results.get(test) != expected[test]} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "attributes"), [(0, {}), (1, {"emulate_tpu": 1, "emulate_tpws": 1})], ids=["thick", "discards"]
)
def test_the_baseline_is_what_plain_lio_gives(lio: Path, xfs: Path, column: int, attributes: dict[str, int]) -> None:
    results = _plain_lio(xfs, attributes)
    assert results.keys() == BASELINE.keys()
    steady = {test: plain[column] for test, plain in BASELINE.items() if plain[column] != VARIES}
    assert {test: results[test] for test in steady} == steady


def _plain_lio(directory: Path, attributes: dict[str, int]) -> Results:
    backings = [directory / f"plain{number}.raw" for number in range(WIDTH)]
    try:
        return run_suites([_plain_lun(backing, attributes) for backing in backings])
    finally:
        for backing in backings:
            backing.unlink(missing_ok=True)


def _plain_lun(backing: Path, attributes: dict[str, int]) -> Initiator:
    """Made by hand, as targetcli makes it, with nothing set but the attributes; no CHAP."""
    backing.touch()
    os.truncate(backing, SIZE)
    with loop.attached(backing) as device:
        disk = rtslib.BlockStorageObject(backing.stem, str(device))
    for name, value in attributes.items():
        disk.set_attribute(name, value)
    iqn = f"iqn.2026-11.org.example:{backing.stem}"
    group = rtslib.TPG(rtslib.Target(rtslib.FabricModule("iscsi"), iqn), 1)
    group.set_attribute("authentication", 0)
    rtslib.LUN(group, 1, disk)
    rtslib.MappedLUN(rtslib.NodeACL(group, INITIATOR), 1, 1)
    rtslib.NetworkPortal(group, *PORTAL)
    group.enable = True
    return Initiator(f"{PORTAL[0]}:{PORTAL[1]}", iqn, INITIATOR)
