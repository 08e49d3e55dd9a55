"""What `doctor` says of a host, found out by trying; and of one where the tools are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.config import load
from app.db import Database
from app.diagnosis import Check, examine
from app.supervisor import prepare
from pools.directory import DirectoryPool
from tests.support.filesystems import SMALLEST, Kind, mounted
from tests.support.postgres import postgres_running
from tests.support.rows import pool
from tests.support.service import free_port

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


def look(home: Path, check: str, **flags: Any) -> Check:
    return next(c for c in examine(load(home, environ={}, flags=flags)) if c.name == check)


def pool_at(tmp_path: Path, path: Path) -> Check:
    return look(tmp_path / "home", "pool default", pools={"default": {"path": str(path)}})


@pytest.mark.parametrize(
    ("kind", "verdict", "says"), [("xfs", "ok", "clones take no time"), ("tmpfs", "limited", "no reflink")]
)
def test_an_empty_pool_is_tried_and_stays_empty(tmp_path: Path, kind: Kind, verdict: str, says: str) -> None:
    with mounted(kind, max(SMALLEST[kind], 8 * MIB), tmp_path) as point:
        check = pool_at(tmp_path, point)
        assert (check.verdict, list(point.iterdir())) == (verdict, [])
        assert says in check.detail


def test_a_pool_under_the_home_is_made_by_the_start(tmp_path: Path) -> None:
    assert look(tmp_path / "home", "pool default").verdict in ("ok", "limited")
    assert list(tmp_path.iterdir()) == []


def test_a_pool_elsewhere_must_be_there(tmp_path: Path) -> None:
    check = pool_at(tmp_path, tmp_path / "not" / "yet")
    assert (check.verdict, list(tmp_path.iterdir())) == ("missing", [])
    assert "make the directory" in check.detail


def test_a_pool_in_use_is_fine(tmp_path: Path) -> None:
    DirectoryPool("default", tmp_path).activate()
    before = sorted(tmp_path.rglob("*"))
    assert pool_at(tmp_path, tmp_path).verdict in ("ok", "limited")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_with_other_things_is_no_pool(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    check = pool_at(tmp_path, tmp_path)
    assert check.verdict == "missing"
    assert "neither a pool nor empty" in check.detail


def test_a_pool_that_cannot_be_written_is_missing(tmp_path: Path) -> None:
    assert pool_at(tmp_path, Path("/proc/self/task")).verdict == "missing"


def test_a_pool_that_is_not_mounted_is_missing(tmp_path: Path) -> None:
    """The database knows the pool, and the directory is not it."""
    home, place = tmp_path / "home", tmp_path / "place"
    place.mkdir()
    settings = load(home, environ={}, flags={"pools": {"default": {"path": str(place)}}})
    prepare(settings)
    database = Database(settings.database_url)
    with database.write() as session:
        session.add(pool(pool_id=uuid4()))
    database.close()
    check = pool_at(tmp_path, place)
    assert check.verdict == "missing"
    assert "is its file system mounted?" in check.detail


def test_the_database_is_asked(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "made at the first start" in look(home, "database").detail
    settings = load(home, environ={})
    settings.make_directories()
    (home / "stratus.db").touch()
    assert "brings it to this version" in look(home, "database").detail
    prepare(settings)
    assert look(home, "database") == Check("ok", "database", f"sqlite:///{home}/stratus.db answers")
    (home / "stratus.db").write_bytes(b"no database" * 1000)
    assert "not a database" in look(home, "database").detail


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql+psycopg://stratus:sesame@127.0.0.1:{port}/stratus", "refused"),
        ("nosuch://stratus:sesame@/stratus", "nosuch"),
        ("stratus:sesame", "URL"),
    ],
)
def test_a_database_that_does_not_answer_is_missing(tmp_path: Path, url: str, says: str) -> None:
    check = look(tmp_path / "home", "database", database={"url": url.format(port=free_port())})
    assert check.verdict == "missing"
    assert says in check.detail
    assert "sesame" not in check.detail


def test_postgresql_is_asked(tmp_path: Path) -> None:
    with postgres_running() as server:
        url = server.url("postgres")
        assert look(tmp_path / "home", "database", database={"url": url}).verdict == "ok"
