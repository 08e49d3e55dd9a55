"""The commands for images against the real service: a file up, judged, used, described and down again."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.test_commands import CONFLICT, MIB, User, new_user
from tests.support.service import RunningService

CONTENT = b"not an empty image".ljust(512, b".") * (8 * MIB // 512)


@pytest.fixture
def alice(service: RunningService) -> User:
    return new_user(service, "alice")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "machine.raw"
    path.write_bytes(CONTENT)
    return path


def test_an_image_from_a_file_to_a_volume_and_back(alice: User, file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "machine.raw.gz"
    packed.write_bytes(subprocess.run(["gzip", "-c", file], check=True, capture_output=True).stdout)
    image = alice.json("upload-image", str(packed), "-t", "machine")
    assert (image["state"], image["size"], image["name"]) == ("available", len(CONTENT), "machine")
    assert image["source_digests"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    down, raw = tmp_path / "down.qcow2", tmp_path / "down.raw"
    alice.run("download-image", image["id"], str(down))
    assert hashlib.sha256(down.read_bytes()).hexdigest() == image["digest"]
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", down, raw], check=True)
    assert raw.read_bytes() == CONTENT
    volume = alice.create("--image", image["id"], "-s", "16MiB")
    alice.attach(volume, tmp_path / "a.json").read(32, 32, ord("."))
    assert "image-pinned" in alice.run("delete-image", image["id"], code=CONFLICT).stderr
    alice.run("detach-volume", volume)
    alice.run("delete-volume", volume)
    alice.run("delete-image", image["id"])
    assert alice.json("describe-images") == []


def test_a_volume_becomes_an_image_with_metadata(alice: User, tmp_path: Path) -> None:
    volume = alice.create("-s", "1MiB")
    image = alice.json("create-image", "--volume", volume, "-t", "kept")
    assert (image["origin"]["kind"], image["size"]) == ("volume", MIB)
    entry = tmp_path / "entry.xml"
    about = alice.json("build-metadata", image["id"], "--os", "debian", "-o", str(entry))
    assert about["sha256"] == image["digest"]
    assert about["identifier"] in entry.read_text()


def test_what_was_not_announced_is_refused(alice: User, file: Path) -> None:
    wrong = alice.run("upload-image", str(file), "--checksum", f"sha256:{'0' * 64}", code=CONFLICT)
    assert "wrong-digest" in wrong.stderr
    other = alice.run("upload-image", str(file), "--image-format", "qcow2", code=CONFLICT)
    assert "bad-format" in other.stderr
    assert [each["state"] for each in alice.json("describe-images")] in ([], ["error", "error"])


def test_a_reference_that_is_none(alice: User) -> None:
    assert "bad-reference" in alice.run("create-image", "no-reference", code=CONFLICT).stderr
    assert "no-image-entry" in alice.run("policy-image", "A" * 27, code=CONFLICT).stderr
