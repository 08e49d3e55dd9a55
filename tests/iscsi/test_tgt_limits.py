from __future__ import annotations

from pathlib import Path

import pytest

from iscsi.limits import RESERVE, check_threads, free_threads
from iscsi.target import TargetLimit
from tests.iscsi.conftest import Brake, House


def _host(root: Path, membership: str, *, total: int = 100, pid_max: int = 32768, threads_max: int = 32768) -> Path:
    (root / "sys/kernel").mkdir(parents=True)
    (root / "self").mkdir()
    (root / "loadavg").write_text(f"0.00 0.01 0.05 1/{total} 4711\n")
    (root / "sys/kernel/pid_max").write_text(f"{pid_max}\n")
    (root / "sys/kernel/threads-max").write_text(f"{threads_max}\n")
    (root / "self/cgroup").write_text(membership)
    return root


def _group(directory: Path, limit: str, current: int) -> None:
    directory.mkdir(parents=True)
    (directory / "pids.max").write_text(f"{limit}\n")
    (directory / "pids.current").write_text(f"{current}\n")


def test_a_lun_without_its_threads_is_completed_when_there_is_room(slow_house: House, brake: Brake) -> None:
    export = slow_house.export()
    (brake.directory / "no-threads").touch()
    with pytest.raises(TargetLimit):
        slow_house.target.ensure_export(export)
    assert not slow_house.target.inventory()[0].complete
    assert slow_house.initiator(export).login_error() is not None
    (brake.directory / "no-threads").unlink()
    slow_house.target.ensure_export(export)
    assert slow_house.target.inventory()[0].complete
    assert slow_house.initiator(export).login_error() is None


def test_this_host_has_room_for_one_lun() -> None:
    check_threads(4, None)


def test_no_host_has_room_for_a_million_threads() -> None:
    with pytest.raises(TargetLimit) as caught:
        check_threads(10**9, None)
    assert caught.value.needed == 10**9
    assert "no room for another LUN" in str(caught.value)


@pytest.mark.parametrize("limit", ["pid_max", "threads_max"])
def test_the_limits_of_the_kernel(tmp_path: Path, limit: str) -> None:
    proc = _host(tmp_path / "proc", "0::/\n", **{limit: 100 + RESERVE + 4})
    check_threads(4, None, proc, tmp_path)
    with pytest.raises(TargetLimit, match="it needs 5 threads"):
        check_threads(5, None, proc, tmp_path)


@pytest.mark.parametrize(("membership", "root"), [("0::/a/b\n", ""), ("9:cpu:/\n8:pids:/a/b\n0::/\n", "pids")])
def test_the_limit_of_every_group_above(tmp_path: Path, membership: str, root: str) -> None:
    proc = _host(tmp_path / "proc", membership)
    _group(tmp_path / "cgroup" / root / "a", str(RESERVE + 14), 10)
    _group(tmp_path / "cgroup" / root / "a/b", "max", 10)
    check_threads(4, None, proc, tmp_path / "cgroup")
    with pytest.raises(TargetLimit, match=r"pids\.max") as caught:
        check_threads(5, None, proc, tmp_path / "cgroup")
    assert caught.value.free == 4
    assert free_threads(None, proc, tmp_path / "cgroup") == 4


def test_of_a_host_that_is_full_nothing_is_free(tmp_path: Path) -> None:
    assert free_threads(None, _host(tmp_path / "proc", "0::/\n", pid_max=100 + RESERVE - 1), tmp_path) == 0
