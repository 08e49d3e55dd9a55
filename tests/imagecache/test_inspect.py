"""Disks of strangers: each kind that is refused, by its own error; and what comes of those that are taken."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from blockdev import loop
from blockdev.extents import data_ranges
from imagecache import format_probe, sandboxed_qemu
from imagecache.errors import BadFormat, CacheFull, Damaged, ImageError, SandboxFailed, TooLarge
from imagecache.format_probe import probe
from imagecache.inspect import ImageLimits, Inspection, flatten, inspect
from imagecache.sandbox import Sandbox
from tests.imagecache.hostile import HOSTILE, MAGICS, over, u64
from tests.imagecache.support import LIMITS, MIB, content, make_qcow2, make_raw, no_progress, nodes_of, qemu_img
from tests.support.filesystems import mounted

SIZE = 8 * MIB


def flattened(sandbox: Sandbox, path: Path, format: str | None, into: Path, limits: ImageLimits = LIMITS) -> Inspection:
    found = inspect(sandbox, path, format, limits)
    flatten(sandbox, path, found, into, limits, no_progress)
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_content(one: Path, other: Path, format: str = "raw") -> bool:
    return "identical" in qemu_img("compare", "-f", format, "-F", "qcow2", one, other)


def refusal(sandbox: Sandbox, path: Path, format: str | None, into: Path) -> tuple[str, type[ImageError]]:
    """Who refused it, and how."""
    try:
        found = inspect(sandbox, path, format, LIMITS)
    except ImageError as error:
        return "inspector", type(error)
    with pytest.raises(ImageError) as refused:
        flatten(sandbox, path, found, into, LIMITS, no_progress)
    return "qemu-img", refused.type


@pytest.mark.parametrize(
    "said",
    [
        '{"formats": [], "size": Infinity, "refusal": null}',
        '{"formats": [], "size": -5120, "refusal": null}',
        '{"formats": [], "size": 5, "refusal": ["ImageError"]}',
        '{"formats": 7, "size": 5, "refusal": null}',
        "[" * 100_000,
    ],
)
def test_a_probe_that_was_taken_over_says_nothing_that_counts(
    sandbox: Sandbox, place: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    (place / "probe.py").write_text(f"print({said!r})")
    monkeypatch.setattr(format_probe, "__file__", str(place / "probe.py"))
    (place / "image").write_bytes(bytes(512))
    with pytest.raises(Damaged, match="cannot be read"):
        inspect(sandbox, place / "image", None, LIMITS)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused(sandbox: Sandbox, place: Path, name: str) -> None:
    make, told, error = HOSTILE[name]
    make(place / "image")
    who = "qemu-img" if name.startswith("flatten") or name == "truncated qcow2" else "inspector"
    assert refusal(sandbox, place / "image", told, place / "made") == (who, error)


@pytest.mark.parametrize("name", MAGICS)
def test_what_has_the_magic_of_a_format_is_not_raw(place: Path, name: str) -> None:
    found, make = MAGICS[name]
    make(place / "image")
    with (place / "image").open("rb") as image:
        assert probe(image)["formats"] == [found]


@pytest.mark.parametrize("name", ["qcow2+ISO polyglot", "VHD", "VMDK descriptor"])
def test_what_is_told_of_no_format_is_no_better(sandbox: Sandbox, place: Path, name: str) -> None:
    HOSTILE[name][0](place / "image")
    with pytest.raises(BadFormat):
        inspect(sandbox, place / "image", None, LIMITS)


def test_without_a_format_it_is_what_it_is(sandbox: Sandbox, place: Path) -> None:
    assert inspect(sandbox, make_raw(place / "raw"), None, LIMITS) == Inspection("raw", SIZE)
    assert inspect(sandbox, make_qcow2(place / "qcow2"), None, LIMITS) == Inspection("qcow2", SIZE)


# ---------------------------------------------------------------- what is taken


def gpt(path: Path) -> Path:
    """A protective MBR, both headers of a GPT, and a file system where one would be."""
    entry = bytes([0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF]) + struct.pack("<II", 1, SIZE // 512 - 1)
    make_raw(path)
    return over(
        path, (446, entry), (510, b"\x55\xaa"), (512, b"EFI PART"), (-512, b"EFI PART"), (MIB + 1080, b"\x53\xef")
    )


PLAIN = {
    "with a boot sector": make_raw,
    "GPT": gpt,
    "a file system and no partitions": lambda path: over(make_raw(path), (0, bytes(512)), (1080, b"\x53\xef")),
    "XFS": lambda path: over(make_raw(path), (0, b"XFSB")),
    "random": lambda path: path.write_bytes(content("random", SIZE)),
    "zeros": lambda path: path.write_bytes(bytes(SIZE)),
    "magics where nobody keeps them": lambda path: over(
        make_raw(path), (512, b"QFI\xfb"), (MIB + 0x4000, b"SKUL\xba\xbe"), (MIB, b"LUKS\xba\xbe"), (0x20000, b"KDMV")
    ),
    "a sector": lambda path: path.write_bytes(content("sector", 512)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_raw_disks_are_taken(sandbox: Sandbox, place: Path, name: str) -> None:
    image = place / "image"
    PLAIN[name](image)
    found = flattened(sandbox, image, "raw", place / "made")
    assert found == Inspection("raw", image.stat().st_size)
    assert same_content(image, place / "made")


QCOW2 = {
    "as it comes": (),
    "version 2": ("-o", "compat=0.10"),
    "compressed": ("-c",),
    "compressed with zstd": ("-c", "-o", "compression_type=zstd"),
    "small clusters": ("-o", "cluster_size=512"),
    "large clusters": ("-o", "cluster_size=2M"),
    "lazy refcounts": ("-o", "lazy_refcounts=on"),
    "refcounts of a bit": ("-o", "refcount_bits=1"),
    "preallocated": ("-o", "preallocation=metadata"),
    "zeros that are allocated": ("-S", "0"),
}


@pytest.fixture(scope="module")
def plain_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of what is made of the plain raw disk."""
    home = tmp_path_factory.mktemp("plain")
    flattened(Sandbox(), make_raw(home / "raw"), "raw", home / "made")
    assert same_content(home / "raw", home / "made")
    return digest(home / "made")


@pytest.mark.parametrize("name", QCOW2)
def test_of_one_content_comes_one_file(sandbox: Sandbox, place: Path, plain_digest: str, name: str) -> None:
    image = make_qcow2(place / "image", *QCOW2[name])
    assert flattened(sandbox, image, "qcow2", place / "made") == Inspection("qcow2", SIZE)
    assert digest(place / "made") == plain_digest


def test_what_is_made_is_plain_and_read_only(sandbox: Sandbox, place: Path) -> None:
    flattened(sandbox, make_raw(place / "image"), "raw", place / "made")
    found = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", place / "made"))
    assert found["format-specific"]["data"] == {
        "compat": "1.1", "compression-type": "zlib", "corrupt": False, "extended-l2": False, "lazy-refcounts": False,
        "refcount-bits": 16,
    }  # fmt: skip
    assert (found["virtual-size"], found["cluster-size"], "backing-filename" in found) == (SIZE, 65536, False)
    assert (place / "made").stat().st_mode & 0o777 == 0o444
    assert found["actual-size"] < 4 * MIB


def test_leaked_clusters_are_left_behind(sandbox: Sandbox, place: Path) -> None:
    image = make_qcow2(place / "image")
    with image.open("r+b") as file:
        file.seek(0, 2)
        end = file.tell()
        file.truncate(end + 65536)
        file.seek(2 * 65536 + end // 65536 * 2)
        file.write(b"\0\1")
    assert json.loads(qemu_img_check(image))["leaks"] == 1
    flattened(sandbox, image, "qcow2", place / "made")
    assert "leaks" not in json.loads(qemu_img_check(place / "made"))


def qemu_img_check(path: Path) -> str:
    return subprocess.run(["qemu-img", "check", "--output=json", path], capture_output=True, text=True).stdout


def test_odd_sizes_are_filled_up_to_a_sector(sandbox: Sandbox, place: Path) -> None:
    (place / "image").write_bytes(content("odd", 5 * 512 + 1))
    assert flattened(sandbox, place / "image", "raw", place / "made") == Inspection("raw", 6 * 512)


def test_a_guests_disk_is_raw_whatever_it_holds(sandbox: Sandbox, place: Path) -> None:
    """A guest may write what it likes into its disk, and gets the same back."""
    disk = place / "disk"
    make_qcow2(place / "guest")
    over(place / "guest", (8, u64(512)), (512, b"/etc/passwd"))
    disk.write_bytes((place / "guest").read_bytes())
    flatten(sandbox, disk, Inspection("raw", disk.stat().st_size), place / "made", LIMITS, no_progress)
    assert same_content(disk, place / "made")


def test_a_block_device_is_read_like_a_file(sandbox: Sandbox, place: Path) -> None:
    raw = make_raw(place / "raw")
    flattened(sandbox, raw, "raw", place / "of file")
    with loop.attached(raw, read_only=True) as device:
        flatten(sandbox, device, Inspection("raw", SIZE), place / "of device", LIMITS, no_progress)
        assert nodes_of(device) == []
    assert digest(place / "of file") == digest(place / "of device")


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_the_largest_disk_that_is_allowed(sandbox: Sandbox, place: Path, format: str) -> None:
    image = make_raw(place / "image") if format == "raw" else make_qcow2(place / "image")
    assert inspect(sandbox, image, format, ImageLimits(SIZE, SIZE)).size == SIZE
    with pytest.raises(TooLarge):
        inspect(sandbox, image, format, ImageLimits(SIZE - 1, SIZE))
    with pytest.raises(TooLarge):
        inspect(sandbox, image, format, ImageLimits(SIZE, image.stat().st_size - 1))


def test_an_image_may_expand_only_so_far(sandbox: Sandbox, place: Path) -> None:
    raw = place / "raw"
    raw.write_bytes(b"\xaa" * SIZE)
    image = make_qcow2(place / "image", "-c", raw=raw)
    most = ImageLimits(SIZE, SIZE, expansion=2, least_bound=MIB)
    with pytest.raises(TooLarge, match="more came out of it"):
        flattened(sandbox, image, "qcow2", place / "made", most)
    flattened(sandbox, image, "qcow2", place / "again", ImageLimits(SIZE, SIZE, expansion=2, least_bound=SIZE + MIB))


def test_a_full_disk_is_said(sandbox: Sandbox, place: Path) -> None:
    with mounted("tmpfs", MIB, place) as small, pytest.raises(CacheFull):
        flattened(sandbox, make_raw(place / "image"), "raw", small / "made")


def test_progress_is_told_and_cancels(sandbox: Sandbox, place: Path) -> None:
    image = place / "image"
    image.write_bytes(content("much", 32 * MIB))
    found = inspect(sandbox, image, "raw", LIMITS)
    seen: list[tuple[int, int]] = []
    flatten(sandbox, image, found, place / "made", LIMITS, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (32 * MIB, 32 * MIB)

    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        flatten(sandbox, image, found, place / "cancelled", LIMITS, cancel)
    assert (place / "cancelled").stat().st_size < 32 * MIB


def test_qemu_img_that_does_not_end_is_killed(sandbox: Sandbox, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandboxed_qemu, "_PATIENCE", -10)
    image = make_raw(place / "image")
    with pytest.raises(SandboxFailed, match="did not end in time"):
        flatten(sandbox, image, Inspection("raw", SIZE), place / "made", LIMITS, no_progress)


def test_what_qemu_img_made_is_looked_at_like_the_rest(sandbox: Sandbox, place: Path) -> None:
    """A disk said to be smaller than it is, as after a fault of qemu's: what came out is not what was inspected."""
    with pytest.raises((Damaged, TooLarge)):
        flatten(sandbox, make_raw(place / "image"), Inspection("raw", SIZE - 512), place / "made", LIMITS, no_progress)


# ---------------------------------------------------------------- out of the cache again


@pytest.mark.parametrize("kind", ["file", "device"])
def test_an_image_becomes_a_raw_disk_with_its_holes(sandbox: Sandbox, place: Path, kind: str) -> None:
    raw, target = make_raw(place / "raw"), place / "target"
    flattened(sandbox, raw, "raw", place / "made")
    with target.open("wb") as file:
        file.truncate(SIZE + MIB)

    def write(path: Path) -> None:
        sandboxed_qemu.to_raw(sandbox, place / "made", path, size=SIZE, reads_as_zeros=True, progress=no_progress)

    if kind == "file":
        write(target)
    else:
        with loop.attached(target) as device:
            write(device)
    assert target.read_bytes() == raw.read_bytes() + bytes(MIB)
    fd = os.open(target, os.O_RDONLY)
    try:
        assert sum(length for _, length in data_ranges(fd)) < 3 * MIB
    finally:
        os.close(fd)


def test_old_bytes_of_a_target_are_written_over(sandbox: Sandbox, place: Path) -> None:
    raw, target = make_raw(place / "raw"), place / "target"
    flattened(sandbox, raw, "raw", place / "made")
    target.write_bytes(b"old!" * (SIZE // 4))
    sandboxed_qemu.to_raw(sandbox, place / "made", target, size=SIZE, reads_as_zeros=False, progress=no_progress)
    assert target.read_bytes() == raw.read_bytes()


def test_every_refusal_is_known_to_clients() -> None:
    codes = [error.code for _, _, error in HOSTILE.values()]
    assert all(code != ImageError.code for code in codes)
