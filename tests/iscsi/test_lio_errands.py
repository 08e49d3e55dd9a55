"""Errands on plain directories; a FIFO that nobody reads is what makes one wait. On configfs: tests/lio/inside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from iscsi import lio_errand_runner as runner
from iscsi.lio_errands import RUNNER, Errands
from tests.support.initiator import wait_until

PATIENCE = 30.0


def the_runner() -> int:
    """The pid of the youngest one that is a child of ours."""
    argv = ["pgrep", "--newest", "--parent", str(os.getpid()), "--full", RUNNER.name]
    return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


@pytest.fixture
def stuck(tmp_path: Path) -> str:
    """A directory with a file that cannot be written to before somebody reads it."""
    os.mkfifo(tmp_path / "waits")
    return str(tmp_path)


def release(directory: str) -> None:
    with open(f"{directory}/waits") as reader:
        assert reader.read() == "on"


def test_a_tree_is_deleted_and_what_links_lead_to_is_not(tmp_path: Path) -> None:
    (tmp_path / "tree/below/deep").mkdir(parents=True)
    (tmp_path / "kept/within").mkdir(parents=True)
    (tmp_path / "tree/below/link").symlink_to(tmp_path / "kept")
    assert Errands().run("it", [("delete", f"{tmp_path}/tree")], PATIENCE)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["kept", "within"]


def test_rmdir_leaves_one_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "full/child").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert Errands().run("it", [("rmdir", f"{tmp_path}/full"), ("rmdir", f"{tmp_path}/empty")], PATIENCE)
    assert os.listdir(tmp_path) == ["full"]


def test_one_that_waits_keeps_no_other_and_is_alone_at_its_place(stuck: str) -> None:
    errands = Errands()
    assert not errands.run("one", [("write", stuck, "waits", "on")], 0)
    assert not errands.run("one", [("write", stuck, "other", "never")], PATIENCE)
    assert errands.run("two", [("write", stuck, "two", "written"), ("list", stuck)], PATIENCE)
    assert Path(stuck, "two").read_text() == "written"
    assert errands.running("one")
    release(stuck)
    wait_until(lambda: not errands.running("one"))
    assert sorted(os.listdir(stuck)) == ["two", "waits"]


@pytest.mark.parametrize("act", ["delete", "rmdir"])
def test_what_was_made_anew_while_it_waited_is_left_alone(stuck: str, act: str) -> None:
    errands, place = Errands(), Path(stuck, "place")
    place.mkdir()
    errands.run("it", [("write", stuck, "waits", "on"), (act, str(place)), ("write", stuck, "end", "x")], 0)
    place.rename(Path(stuck, "earlier"))
    place.mkdir()
    release(stuck)
    wait_until(lambda: not errands.running("it"))
    assert sorted(os.listdir(stuck)) == ["earlier", "end", "place", "waits"]


def test_what_is_below_is_found_by_the_directory_and_not_by_its_name(tmp_path: Path) -> None:
    """Somebody takes the name in the very moment between the look and the step."""
    place, theirs = tmp_path / "place", tmp_path / "theirs"
    for directory in (place, theirs):
        (directory / "child").mkdir(parents=True)
    meant = os.open(place, os.O_PATH)
    place.rename(tmp_path / "earlier")
    theirs.rename(place)
    with pytest.raises(OSError, match="not empty"):
        runner.delete(str(place), f"/proc/self/fd/{meant}")
    os.close(meant)
    assert os.listdir(place) == ["child"]
    assert os.listdir(tmp_path / "earlier") == []


def test_no_step_is_taken_when_those_who_asked_are_gone(stuck: str) -> None:
    place = Path(stuck, "place")
    place.mkdir()
    steps = [["write", stuck, os.stat(stuck).st_ino, "waits", "on"], ["rmdir", str(place), place.stat().st_ino]]
    argv = [sys.executable, "-I", "-S", str(RUNNER)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(json.dumps([1, steps]).encode() + b"\n")
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
    threading.Thread(target=release, args=(stuck,), daemon=True).start()
    Path(stuck, "waits").write_text("on")  # nobody else writes any more
    assert place.exists()


def test_a_runner_that_was_killed_has_a_successor(stuck: str) -> None:
    errands = Errands()
    assert not errands.run("one", [("write", stuck, "waits", "on")], 0)
    killed = the_runner()
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not errands.running("one"))
    assert errands.run("one", [("write", stuck, "file", "written")], PATIENCE)
    assert Path(stuck, "file").read_text() == "written"


def test_a_runner_inherits_nothing_and_ends_with_its_errands(tmp_path: Path) -> None:
    with (tmp_path / "held").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        errands = Errands()
        errands.run("it", [("list", str(tmp_path))], PATIENCE)
        process = Path("/proc", str(the_runner()))
        open_files = {os.readlink(link) for link in process.joinpath("fd").iterdir()}
    assert not any(str(tmp_path) in name for name in open_files)
    assert process.joinpath("environ").read_bytes() == b""
    assert os.readlink(process / "cwd") == "/"
    del errands
    wait_until(lambda: not process.exists())


@pytest.mark.parametrize(
    ("act", "arguments", "left"),
    [("delete", (), []), ("rmdir", (), ["place"]), ("write", ("file", "x"), ["place"]), ("list", (), ["place"])],
)
def test_each_act_is_for_the_inode_that_was_meant(
    tmp_path: Path, act: str, arguments: tuple[str], left: list[str]
) -> None:
    place = tmp_path / "place"
    (place / "child").mkdir(parents=True)
    runner.take(act, str(place), place.stat().st_ino + 1, *arguments)
    assert os.listdir(place) == ["child"]
    runner.take(act, str(place), place.stat().st_ino, *arguments)
    assert os.listdir(tmp_path) == left
