"""qemu-img's verbs on real images, and its complaints by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from blockdev import command, qemu_img
from blockdev.command import Output
from tests.support.filesystems import mounted

MIB = 1 << 20
run = partial(command.run, timeout=60)


def stream(argv: Sequence[str]) -> list[bytes]:
    return [run(argv).stdout.encode()]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw"
    path.write_bytes(b"data" * (MIB // 4) + bytes(MIB))
    return path


@pytest.fixture
def image(raw: Path, tmp_path: Path) -> Path:
    made = tmp_path / "qcow2"
    percents = list(qemu_img.convert_to_qcow2(lambda argv: iter(stream(argv)), qemu_img.node(raw, "raw"), made))
    assert percents[-1] == 100.0
    return made


def test_a_qcow2_is_made_checked_and_written_out_again(image: Path, raw: Path, tmp_path: Path) -> None:
    assert qemu_img.check(run, image) == qemu_img.Check(0, 0, False)
    target = tmp_path / "target"
    target.write_bytes(b"old!" * (MIB // 2))
    for _ in qemu_img.convert_to_raw(
        lambda argv: iter(stream(argv)), qemu_img.node(image, "qcow2"), target, reads_as_zeros=False
    ):
        pass
    assert target.read_bytes() == raw.read_bytes()


def test_damage_is_counted(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(2 * 65536)
        file.write(bytes(64))
    assert qemu_img.check(run, image).errors > 0
    with image.open("r+b") as file:
        file.truncate(6 * 65536)
    assert qemu_img.check(run, image).cut


def test_what_is_no_qcow2_is_unreadable(raw: Path) -> None:
    with pytest.raises(qemu_img.Unreadable, match="not in qcow2 format"):
        qemu_img.check(run, raw)


def test_an_answer_that_is_no_json_is_unreadable(image: Path) -> None:
    with pytest.raises(qemu_img.Unreadable, match="JSON"):
        qemu_img.check(lambda argv: Output("well", ""), image)


def test_a_full_disk_is_named(raw: Path, tmp_path: Path) -> None:
    source = qemu_img.node(raw, "raw")
    with mounted("tmpfs", MIB, tmp_path) as small, pytest.raises(qemu_img.NoRoom):
        list(qemu_img.convert_to_qcow2(lambda argv: iter(stream(argv)), source, small / "made"))


def test_an_overlay_knows_its_backing_file_and_its_format(image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    qemu_img.create_overlay(run, overlay, image, "qcow2", 4 * MIB)
    found = json.loads(run(["qemu-img", "info", "--output=json", str(overlay)]).stdout)
    assert (found["backing-filename"], found["backing-filename-format"]) == (str(image), "qcow2")
    assert found["virtual-size"] == 4 * MIB
    with pytest.raises(qemu_img.Unreadable):
        qemu_img.create_overlay(run, tmp_path / "none", tmp_path / "missing", "qcow2")


@pytest.mark.parametrize("said", ["", "[]", "null", "[" * 100_000])
def test_an_answer_that_is_none_is_no_check(image: Path, said: str) -> None:
    """qemu-img has read a stranger's bytes."""
    with pytest.raises(qemu_img.Unreadable, match="did not answer"):
        qemu_img.check(lambda argv: Output(said, ""), image)
