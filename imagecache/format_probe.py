"""What a file is, and what is said in the header of a qcow2. Runs in the sandbox, as a program of its own:

    python -I -S format_probe.py PACKAGES FILE    prints {"formats": […], "size": …, "refusal": null or […]}

It imports the standard library and oslo.utils' format inspector, nothing of ours, and trusts no byte: what it prints is
judged again by who started it. `formats` are all whose magic is found where that format keeps one, beside raw; "gpt"
and such, the partition tables of plain disks, are none. `refusal` is the name of a class of imagecache.errors, and why.

A hybrid ISO image, a CD that also has a boot sector, is "iso": it is an installer's medium and no machine's disk, and
two programs that look at it disagree about what it is, which is what we refuse.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from typing import BinaryIO

HEAD = 5 << 20
"""Bytes at the start that are looked at: the last copy of a LUKS2 header may begin at 4 MiB."""

Refusal = tuple[str, str]

#: Where each format keeps its magic. qemu's block/*.c, cryptsetup's LUKS2 specification (its second header is at one of
#: nine offsets), ECMA-119 and ECMA-167 (volume descriptors from sector 16 on), xz, gzip, bzip2, zstd, tar.
MAGICS: dict[str, tuple[tuple[int, bytes], ...]] = {
    "qcow": ((0, b"QFI\xfb"),),
    "qed": ((0, b"QED\0"),),
    "vmdk": ((0, b"KDMV"), (0, b"COWD"), (0, b"\xbe\xba\xfe\xca\0\0\0\0")),  # the last is seSparse
    "vhd": ((0, b"conectix"), (0, b"cxsparse")),
    "vhdx": ((0, b"vhdxfile"),),
    "vdi": ((0x40, b"\x7f\x10\xda\xbe"),),
    "parallels": ((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt")),
    "bochs": ((0, b"Bochs Virtual HD Image"),),
    "cloop": ((0, b"#!/bin/sh\n#V2.0 Format\n"),),
    "luks": ((0, b"LUKS\xba\xbe"), *((0x4000 << power, b"SKUL\xba\xbe") for power in range(9))),
    "iso": tuple(
        (0x8001 + number * 0x800, magic)
        for number in range(4)
        for magic in (b"CD001", b"BEA01", b"NSR02", b"NSR03", b"TEA01")
    ),
    "archive": (
        *((0, magic) for magic in (b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")),
        (257, b"ustar"),
    ),
}
#: From the end of the file; the footers of early VHDs are a byte shorter.
FOOTERS = {"vhd": ((512, b"conectix"), (511, b"conectix")), "dmg": ((512, b"koly"),)}
#: oslo's names that are no formats of their own to us.
_PLAIN = {"raw", "gpt"}
_OURS = {"qcow2": "qcow"}

# qcow2.txt in qemu's docs/interop
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_3 = struct.Struct(">QQQII")
_MOST_L1, _MOST_REFTABLE = 32 << 20, 8 << 20
"""Bytes, as qemu itself bounds them (QCOW_MAX_L1_SIZE, QCOW_MAX_REFTABLE_SIZE)."""
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION = 1, 2, 4, 8
_RAW_EXTERNAL = 2  # of the autoclear features
_EXTENSION_END, _EXTENSION_DATA_FILE, _EXTENSION_LUKS = 0, 0x44415441, 0x0537BE77


def formats(head: bytes, tail: bytes) -> set[str]:
    """All formats that these first HEAD and last 512 bytes are of, by our table; raw is what is none of them."""
    found = {name for name, places in MAGICS.items() if any(head.startswith(m, at) for at, m in places)}
    found |= {name for name, places in FOOTERS.items() if any(tail[-at:].startswith(m) for at, m in places)}
    return found | ({"vmdk"} if is_vmdk_descriptor(head) else set())


def is_vmdk_descriptor(head: bytes) -> bool:
    """A text that names the files of a disk. qemu takes what begins, after comments, with a version; others look for
    what else stands in every one."""
    text = head[: 64 << 10].lower()
    lines = (line.strip() for line in text.split(b"\n"))
    first = next((line for line in lines if line and not line.startswith(b"#")), b"")
    return (
        re.match(rb"version\s*=\s*[0-9]", first) is not None
        or b"disk descriptorfile" in text
        or re.search(rb"createtype\s*=", text) is not None
    )


def refusal_of_qcow2(head: bytes, file_size: int) -> Refusal | None:
    """Why this qcow2 is not looked at any further; None for none."""
    if len(head) < _HEADER.size:
        return "Truncated", "the file ends in its header"
    _, version, backing, backing_size, bits, size, crypt, *tables = _HEADER.unpack_from(head)
    if version not in (2, 3):
        return "BadFormat", f"qcow2 of version {version}"
    if backing or backing_size:
        return "HasBackingFile", "it has a backing file"
    if crypt:
        return "Encrypted", "it is encrypted"
    if not 9 <= bits <= 21:
        return "Damaged", f"clusters of 2^{bits} bytes"
    if version == 3 and (refusal := _refusal_of_features(head)):
        return refusal
    return _refusal_of_extensions(head, version, 1 << bits) or _refusal_of_tables(size, 1 << bits, file_size, *tables)


def _refusal_of_features(head: bytes) -> Refusal | None:
    if len(head) < _HEADER.size + _HEADER_3.size:
        return "Truncated", "the file ends in its header"
    incompatible, _, autoclear, refcount_order, _ = _HEADER_3.unpack_from(head, _HEADER.size)
    if incompatible & _DATA_FILE or autoclear & _RAW_EXTERNAL:
        return "HasDataFile", "its data are in another file"
    if unknown := incompatible & ~(_DIRTY | _CORRUPT | _COMPRESSION):
        return "UnknownFeatures", f"incompatible features {unknown:#x}"
    if incompatible & _CORRUPT:
        return "Damaged", "it is marked as corrupt"
    return ("Damaged", f"refcounts of 2^{refcount_order} bits") if refcount_order > 6 else None


def _refusal_of_extensions(head: bytes, version: int, cluster: int) -> Refusal | None:
    """The header's extensions follow it, within its cluster; the last is of type 0."""
    at = struct.unpack_from(">I", head, 100)[0] if version == 3 else 72
    end = min(cluster, len(head))
    if not 72 <= at <= end:
        return "Damaged", f"a header of {at} bytes"
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == _EXTENSION_END:
            return None
        if kind == _EXTENSION_DATA_FILE:
            return "HasDataFile", "it names a file that holds its data"
        if kind == _EXTENSION_LUKS:
            return "Encrypted", "it is encrypted"
        at += 8 + (length + 7) // 8 * 8
    return ("Damaged", "the header's extensions do not end in its cluster") if at > end else None


def _refusal_of_tables(
    size: int, cluster: int, file_size: int, l1_entries: int, l1_at: int, reftable_at: int, reftable_clusters: int,
    snapshots: int, snapshots_at: int,
) -> Refusal | None:  # fmt: skip
    if snapshots:
        return "HasSnapshots", f"{snapshots} internal snapshots"
    needed = -(-size // (cluster * (cluster // 8)))
    l1, reftable = l1_entries * 8, reftable_clusters * cluster
    if l1 > _MOST_L1 or reftable > _MOST_REFTABLE or not reftable:
        return "Damaged", f"an L1 table of {l1} and a refcount table of {reftable} bytes"
    if l1_entries < needed:
        return "Damaged", f"{l1_entries} entries in the L1 table, {needed} needed"
    if l1_at % cluster or reftable_at % cluster or (l1 and not l1_at) or not reftable_at:
        return "Damaged", f"tables at {l1_at} and {reftable_at}"
    if l1_at + l1 > file_size or reftable_at + reftable > file_size:
        return "Damaged", "a table lies past the end of the file"
    return None


def virtual_size(head: bytes, file_size: int) -> int:
    """In bytes; qcow2 or not."""
    if head.startswith(b"QFI\xfb") and len(head) >= _HEADER.size:
        return int(_HEADER.unpack_from(head)[5])
    return file_size


def by_oslo(head: bytes, file_size: int) -> tuple[set[str], Refusal | None]:
    """What oslo.utils takes it for, and whether it finds it unsafe. It reads streams: a magic at the end is ours."""
    from oslo_utils.imageutils import format_inspector as oslo

    inspectors = [kind() for name, kind in oslo.ALL_FORMATS.items() if name != "raw"]
    matches = [each for each in inspectors if _matches(each, head)]
    for match in matches:
        if match.NAME == "qcow2":
            try:
                match.safety_check()
            except (oslo.SafetyCheckFailed, oslo.ImageFormatError) as error:
                return {"qcow"}, ("UnknownFeatures", str(error))
    return {_OURS.get(each.NAME, each.NAME) for each in matches} - _PLAIN, None


def _matches(inspector, head: bytes) -> bool:  # type: ignore[no-untyped-def]
    """An inspector that fails on a file that is not its format's has answered too."""
    try:
        for at in range(0, min(len(head), 1 << 20), 64 << 10):
            inspector.eat_chunk(head[at : at + (64 << 10)])
        inspector.finish()
        return bool(inspector.format_match)
    except Exception:
        return False


def probe(file: BinaryIO) -> dict[str, object]:
    file_size = os.fstat(file.fileno()).st_size
    head = file.read(HEAD)
    file.seek(max(0, file_size - 512))
    theirs, refusal = by_oslo(head, file_size)
    found = formats(head, file.read(512)) | theirs
    if "qcow" in found:
        refusal = refusal_of_qcow2(head, file_size) or refusal
    return {"formats": sorted(found), "size": virtual_size(head, file_size), "refusal": refusal}


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    with open(sys.argv[2], "rb") as image:
        print(json.dumps(probe(image)))
