"""What these functions are for, a power cut, is tried in tests/pools on a real file system."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockdev.files import durable_rename, durable_unlink, fsync_dir, fsync_file


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    path = tmp_path / "staging" / "file"
    path.write_text("new")
    return path


def test_rename_replaces(staged: Path, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    durable_rename(staged, target)
    assert target.read_text() == "new"
    assert not staged.exists()


def test_rename_without_replace(staged: Path, tmp_path: Path) -> None:
    target = tmp_path / "file"
    durable_rename(staged, target, replace=False)
    assert target.read_text() == "new"
    assert target.stat().st_nlink == 1
    assert not staged.exists()


def test_rename_refuses_to_replace(staged: Path, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(FileExistsError):
        durable_rename(staged, target, replace=False)
    assert (staged.read_text(), target.read_text()) == ("new", "old")


def test_unlink_can_be_repeated(staged: Path) -> None:
    durable_unlink(staged)
    durable_unlink(staged)
    assert list(staged.parent.iterdir()) == []


def test_syncing_what_is_not_there_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fsync_file(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fsync_dir(tmp_path / "file")
