"""Disk images that must be refused: how each is made, as what it is told, and the error that is its own."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from imagecache import errors
from imagecache.errors import ImageError
from tests.imagecache.support import MIB, make_qcow2, make_raw, qemu_img

Maker = Callable[[Path], object]
SECRET = "/etc/passwd"


def patched(path: Path, *patches: tuple[int, bytes]) -> Path:
    """A qcow2 with some bytes of its own put over."""
    make_qcow2(path)
    return over(path, *patches)


def over(path: Path, *patches: tuple[int, bytes]) -> Path:
    with path.open("r+b") as file:
        for offset, data in patches:
            file.seek(offset, 2 if offset < 0 else 0)
            file.write(data)
    return path


def raw_with(*patches: tuple[int, bytes]) -> Maker:
    return lambda path: over(make_raw(path), *patches)


def u32(number: int) -> bytes:
    return struct.pack(">I", number)


def u64(number: int) -> bytes:
    return struct.pack(">Q", number)


def with_data_file(path: Path) -> None:
    """`-f qcow2` alone reads the file that it names."""
    data = path.with_suffix(".data")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", path, "1M")


def with_json_backing(path: Path) -> None:
    name = 'json:{"driver":"raw","file":{"driver":"file","filename":"' + SECRET + '"}}'
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", name, path, "1M")


def with_snapshot(path: Path) -> None:
    make_qcow2(path)
    qemu_img("snapshot", "-c", "one", path)


COMPRESSED = {"gz": b"\x1f\x8b\x08", "bz2": b"BZh", "xz": b"\xfd7zXZ\0", "zst": b"\x28\xb5\x2f\xfd"}


def truncated(path: Path) -> None:
    make_qcow2(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - MIB)


def cut_in_header(path: Path) -> None:
    path.write_bytes(make_qcow2(path).read_bytes()[:40])


def qcow2_and_iso(path: Path) -> None:
    """The file of one is the header cluster of the other."""
    patched(path, (0x8000, b"\x01CD001\x01"))


def hybrid_iso(path: Path) -> None:
    over(make_raw(path), (0x8000, b"\x01CD001\x01"))


def of_format(name: str) -> Maker:
    def make(path: Path) -> None:
        qemu_img("convert", "-f", "raw", "-O", name, make_raw(path.with_suffix(".source")), path)

    return make


def vmdk_descriptor(text: str) -> Maker:
    def make(path: Path) -> None:
        path.write_text(text.replace("EXTENT", f'RW 8 FLAT "{SECRET}" 0').ljust(MIB, "\n"))

    return make


def fixed_vhd(path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed", make_raw(path.with_suffix(".source")), path)


def many_references_to_one_cluster(path: Path) -> None:
    """Refcounts and all are right: a gigabyte of it is written out from a file of less than a megabyte."""
    size, entries = 1 << 30, 8192
    make_qcow2(path, "-o", "refcount_bits=64", raw=make_raw(path.with_suffix(".source"), 64 << 10))
    header = path.read_bytes()[:112]
    cluster = 64 << 10
    # header, refcount table, refcount block, L1, two L2, data
    block = [1] * 6 + [2 * entries]
    data = bytearray(7 * cluster)
    data[: len(header)] = header
    data[24:48] = u64(size) + u32(0) + u32(2) + u64(3 * cluster)
    data[48:60] = u64(cluster) + u32(1)
    data[cluster : cluster + 8] = u64(2 * cluster)
    data[2 * cluster : 2 * cluster + 56] = struct.pack(">7Q", *block)
    data[3 * cluster : 3 * cluster + 16] = struct.pack(">2Q", 1 << 63 | 4 * cluster, 1 << 63 | 5 * cluster)
    data[4 * cluster : 6 * cluster] = u64(6 * cluster) * (2 * entries)
    data[6 * cluster :] = b"\xaa" * cluster
    path.write_bytes(data)


DESCRIPTORS = {
    "as qemu writes it": '# Disk DescriptorFile\nversion=1\nCID=fffffffe\ncreateType="monolithicFlat"\nEXTENT\n',
    "after comments": "\n\n # hello\n#world\n\tVersion = 1\nparentCID=ffffffff\nEXTENT\n",
    "without a version": 'CID=1\ncreateType = "vmfs"\nEXTENT\n',
    "behind a boot sector": "\x00" * 512 + "# Disk DescriptorFile\nversion=1\nEXTENT\n",
}

#: name → how it is made, the format told, its error. Those with "flatten" in their name pass the inspector.
HOSTILE: dict[str, tuple[Maker, str, type[ImageError]]] = {
    "truncated qcow2": (truncated, "qcow2", errors.Truncated),
    "qcow2 cut in its header": (cut_in_header, "qcow2", errors.Truncated),
    "nothing": (Path.touch, "raw", errors.Truncated),
    "1 EiB": (lambda path: patched(path, (24, u64(1 << 60))), "qcow2", errors.TooLarge),
    "1 EiB, honestly": (
        lambda path: qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "1E"), "qcow2",
        errors.TooLarge,
    ),
    "8 EiB and more": (lambda path: patched(path, (24, u64((1 << 64) - 1))), "qcow2", errors.TooLarge),
    "backing file": (
        lambda path: qemu_img("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", SECRET, path, "1M"), "qcow2",
        errors.HasBackingFile,
    ),
    "backing file of no length": (lambda path: patched(path, (8, u64(512))), "qcow2", errors.HasBackingFile),
    "json: backing": (with_json_backing, "qcow2", errors.HasBackingFile),
    "data-file": (with_data_file, "qcow2", errors.HasDataFile),
    "data-file by its name only": (
        lambda path: patched(path, (112, u32(0x44415441) + u32(11) + SECRET.encode() + bytes(13))), "qcow2",
        errors.HasDataFile,
    ),
    "data-file by an autoclear bit": (lambda path: patched(path, (88, u64(2))), "qcow2", errors.HasDataFile),
    "unknown feature bit": (lambda path: patched(path, (72, u64(1 << 5))), "qcow2", errors.UnknownFeatures),
    "feature bit 63": (lambda path: patched(path, (72, u64(1 << 63))), "qcow2", errors.UnknownFeatures),
    "extended L2": (
        lambda path: qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", path, "1M"),
        "qcow2", errors.UnknownFeatures,
    ),
    "marked corrupt": (lambda path: patched(path, (72, u64(2))), "qcow2", errors.Damaged),
    "internal snapshot": (with_snapshot, "qcow2", errors.HasSnapshots),
    "LUKS in qcow2": (lambda path: patched(path, (32, u32(2))), "qcow2", errors.Encrypted),
    "LUKS in qcow2 by its header only": (
        lambda path: patched(path, (112, u32(0x0537BE77) + u32(16) + bytes(24))), "qcow2", errors.Encrypted,
    ),
    "AES in qcow2": (lambda path: patched(path, (32, u32(1))), "qcow2", errors.Encrypted),
    "L1 table past the end": (lambda path: patched(path, (40, u64(1 << 40))), "qcow2", errors.Damaged),
    "L1 table of 16 GiB": (lambda path: patched(path, (36, u32(0x7FFFFFFF))), "qcow2", errors.Damaged),
    "L1 table too small": (lambda path: patched(path, (24, u64(900 << 20))), "qcow2", errors.Damaged),
    "refcount table past the end": (lambda path: patched(path, (48, u64(1 << 40))), "qcow2", errors.Damaged),
    "refcount table of 256 TiB": (lambda path: patched(path, (56, u32(0xFFFFFFFF))), "qcow2", errors.Damaged),
    "refcounts of 2^60 bits": (lambda path: patched(path, (96, u32(60))), "qcow2", errors.Damaged),
    "clusters of a byte": (lambda path: patched(path, (20, u32(0))), "qcow2", errors.Damaged),
    "header of 4 GiB": (lambda path: patched(path, (100, u32(0xFFFFFFFF))), "qcow2", errors.Damaged),
    "flatten: L1 table that is its own L2": (
        lambda path: patched(path, (3 * 65536, u64(1 << 63 | 3 * 65536))), "qcow2", errors.Damaged,
    ),
    "flatten: refcounts all zero": (lambda path: patched(path, (2 * 65536, bytes(256))), "qcow2", errors.Damaged),
    "flatten: one cluster many times": (many_references_to_one_cluster, "qcow2", errors.TooLarge),
    "qcow2 of version 1": (lambda path: patched(path, (4, u32(1))), "qcow2", errors.BadFormat),
    "qcow2 of version 4": (lambda path: patched(path, (4, u32(4))), "qcow2", errors.BadFormat),
    "old qcow": (of_format("qcow"), "qcow2", errors.BadFormat),
    "raw that is a qcow2": (make_qcow2, "raw", errors.BadFormat),
    "qcow2 that is raw": (make_raw, "qcow2", errors.BadFormat),
    "qcow2+ISO polyglot": (qcow2_and_iso, "qcow2", errors.BadFormat),
    "qcow2 with a VHD's footer": (lambda path: patched(path, (-512, b"conectix")), "qcow2", errors.BadFormat),
    "hybrid ISO": (hybrid_iso, "raw", errors.BadFormat),
    "LUKS1": (raw_with((0, b"LUKS\xba\xbe\x00\x01")), "raw", errors.BadFormat),
    "VHD": (fixed_vhd, "raw", errors.BadFormat),
    "LUKS2 with its second header only": (raw_with((0x400000, b"SKUL\xba\xbe\x00\x02")), "raw", errors.BadFormat),
    "VMDK descriptor": (vmdk_descriptor(DESCRIPTORS["after comments"]), "raw", errors.BadFormat),
    "told to be a VMDK": (of_format("vmdk"), "vmdk", errors.BadFormat),
}  # fmt: skip

#: Disks that are not raw, by what the inspector must find them to be.
MAGICS: dict[str, tuple[str, Maker]] = {
    "UDF": ("iso", raw_with((0x8801, b"NSR03"))),
    "LUKS2": ("luks", raw_with((0, b"LUKS\xba\xbe\x00\x02"))),
    **{
        f"LUKS2 with its second header at {0x4000 << power:#x}": (
            "luks", raw_with((0x4000 << power, b"SKUL\xba\xbe\x00\x02"))
        )
        for power in range(9)
    },
    **{name: (name, of_format(name)) for name in ("vmdk", "vhdx", "vdi", "qed", "parallels")},
    "VHD": ("vhd", of_format("vpc")),
    "VHD with a footer of 511 bytes": ("vhd", raw_with((-511, b"conectix"))),
    "DMG": ("dmg", raw_with((-512, b"koly"))),
    "bochs": ("bochs", raw_with((0, b"Bochs Virtual HD Image"))),
    "cloop": ("cloop", raw_with((0, b"#!/bin/sh\n#V2.0 Format\n"))),
    "VMDK seSparse": ("vmdk", raw_with((0, b"\xbe\xba\xfe\xca\0\0\0\0"))),
    "VMDK 3": ("vmdk", raw_with((0, b"COWD"))),
    "OVA": ("archive", raw_with((257, b"ustar"))),
    **{name: ("archive", raw_with((0, magic))) for name, magic in COMPRESSED.items()},
    **{f"VMDK descriptor {name}": ("vmdk", vmdk_descriptor(text)) for name, text in DESCRIPTORS.items()},
}  # fmt: skip
