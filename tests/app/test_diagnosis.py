"""What `doctor` says of a host, found out by trying; and of one where the tools are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.config import load
from app.diagnosis import examine
from tests.support.filesystems import mounted

MIB = 1 << 20


def doctor(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "app.cli", "doctor", "--home", str(home)]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def verdicts(text: str) -> dict[str, tuple[str, str]]:
    lines = [line.split(None, 1) for line in text.splitlines()]
    return {rest[:14].strip(): (verdict, rest[15:]) for verdict, rest in lines}


def test_this_host_can_run_the_service(tmp_path: Path) -> None:
    done = doctor(tmp_path / "home")
    found = verdicts(done.stdout)
    assert done.returncode == 0, done.stdout
    assert found["tgtd"][0] == found["target"][0] == found["setpriv"][0] == found["sqlite"][0] == "ok"
    assert "tgt answers" in found["target"][1]
    assert found["pool default"][0] in ("ok", "limited")
    assert not (tmp_path / "home").exists()  # looking makes nothing


def test_a_host_without_tools_is_told_what_to_install(tmp_path: Path) -> None:
    """Only what needs no PATH is left; the directories of root's own tools are looked into as well."""
    empty = tmp_path / "empty"
    empty.mkdir()
    done = doctor(tmp_path / "home", PATH=str(empty))
    found = verdicts(done.stdout)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert found["setpriv"] == (
        "missing",
        "not found; for children that die with their parent: apt-get install util-linux",
    )
    assert found["qemu-img"][0] == found["iscsi-inq"][0] == "limited"
    assert "apt-get install qemu-utils" in found["qemu-img"][1]
    assert found["target"][0] == "missing"
    assert "tgtd does not start" in found["target"][1]
    assert found["sandbox"] == ("limited", "no bwrap; needed for images: apt-get install bubblewrap")


@pytest.mark.parametrize(("kind", "verdict", "says"), [("xfs", "ok", "reflink"), ("tmpfs", "limited", "no reflink")])
def test_a_pool_is_tried_where_it_will_lie(tmp_path: Path, kind: str, verdict: str, says: str) -> None:
    size = 300 * MIB if kind == "xfs" else 8 * MIB
    with mounted(kind, size, tmp_path) as point:  # type: ignore[arg-type]
        pools = {"default": {"path": str(point / "not" / "yet")}}
        (check,) = [
            c for c in examine(load(tmp_path / "home", environ={}, flags={"pools": pools})) if c.name.startswith("pool")
        ]
        assert (check.verdict, list(point.iterdir())) == (verdict, [])
        assert says in check.detail


def test_a_pool_that_cannot_be_written_is_missing(tmp_path: Path) -> None:
    pools = {"default": {"path": "/proc/stratus"}}
    (check,) = [
        c for c in examine(load(tmp_path / "home", environ={}, flags={"pools": pools})) if c.name.startswith("pool")
    ]
    assert check.verdict == "missing"
