"""What tgtd's `show` answers mean.

The whole listing of targets, four blanks a level:

    Target 5: iqn.2026-11.org.example:8d8ac610-…
        System information: …
        I_T nexus information:
            I_T nexus: 1
                Initiator: iqn.… alias: FREE TEXT FROM THE NETWORK
                …
        LUN information:
            LUN: 0 …
            LUN: 1
                SCSI ID: 6001405…
                Size: 1074 MB, Block size: 512
                …
        Account information:
            name
            name (outgoing)
        ACL information:
            10.0.0.1
            iqn.2026-11.org.example:node1

The alias may hold line feeds, so an initiator that is logged in can write lines of its choice into the listing. We go
by headers that are in the list of names, which has no foreign text in it; believe only what comes after the last "LUN
information:" of a block; and that only with the target's marker, an account whose name is a secret, or when no session
precedes it. Sessions are read from the connection list, which prints no alias.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20

_HEADER = re.compile(r"^Target (\d+): (\S+)\n", re.MULTILINE)
_NAMED = re.compile(r"^ {8}Target (\d+): (\S+)$", re.MULTILINE)
_CONNECTION = re.compile(
    # No address where the peer reset the connection: getpeername(2) fails, and the write in flight goes on.
    r"^Session: (\d+)\n {4}Connection: (\d+)\n {8}Initiator: (\S+)\n {8}(?:IP Address: (\S+))?",
    re.MULTILINE,
)
_PORTAL = re.compile(r"^Portal: (\S+),\d+$", re.MULTILINE)
_FIELD = re.compile(r"^ {12}(?P<key>[A-Za-z -]+): (?P<value>.*)$", re.MULTILINE)
_ISCSI_NAME = ("iqn.", "eui.", "naa.")


@dataclass(frozen=True)
class Lun:
    """One logical unit. `path` is None and `size` 0 when its backing is closed."""

    scsi_id: str
    serial: str
    size: int
    online: bool
    read_only: bool
    thin: bool
    path: Path | None


@dataclass(frozen=True)
class Block:
    """One target: its LUN 1, the accounts in the order of their slots, and who may log in."""

    lun: Lun | None
    accounts: tuple[str, ...]
    outgoing: str | None
    initiators: tuple[str, ...]
    addresses: tuple[str, ...]


def target_names(listing: str) -> list[tuple[int, str]]:
    """(tid, IQN) of every target, by tid, from the driver's list."""
    return sorted((int(tid), iqn) for tid, iqn in _NAMED.findall(listing))


def connections(listing: str) -> list[tuple[int, int, str, str]]:
    """(session, connection, initiator, address) of a target's connection list."""
    return [(int(sid), int(cid), name, address) for sid, cid, name, address in _CONNECTION.findall(listing)]


def portals(listing: str) -> list[str]:
    """HOST:PORT of every open portal, IPv6 hosts in brackets."""
    return _PORTAL.findall(listing)


def sections(listing: str, known: Collection[tuple[int, str]], marker: Callable[[int], str]) -> dict[int, str]:
    """By tid, what can be believed of each target in the listing; `block` reads it.

    `known` are the (tid, IQN) there were before or after it was taken, `marker` gives a target's secret account. A
    target that an initiator has made unreadable is left out.
    """
    headers = [match for match in _HEADER.finditer(listing) if (int(match[1]), match[2]) in known]
    times = Counter(int(header[1]) for header in headers)
    believed: dict[int, str] = {}
    for number, header in enumerate(headers):
        tid = int(header[1])
        end = next((later.start() for later in headers[number:] if later[0] != header[0]), len(listing))
        sessions, found, section = listing[header.end() : end].rpartition("\n    LUN information:\n")
        fresh = times[tid] == 1 and "I_T nexus: " not in sessions
        if found and (fresh or f"\n        {marker(tid)}\n" in section):
            believed[tid] = section
    return believed


def block(section: str) -> Block:
    """What a section says."""
    luns, _, rest = section.partition("    Account information:\n")
    accounts, _, acl = rest.partition("    ACL information:\n")
    users = [line.strip() for line in accounts.splitlines()]
    outgoing = [user.removesuffix(" (outgoing)") for user in users if user.endswith(" (outgoing)")]
    entries = [line.strip() for line in acl.splitlines() if line.startswith("        ")]
    return Block(
        lun=_lun(luns),
        accounts=tuple(user for user in users if not user.endswith(" (outgoing)")),
        outgoing=outgoing[0] if outgoing else None,
        initiators=tuple(entry for entry in entries if entry.startswith(_ISCSI_NAME)),
        addresses=tuple(entry for entry in entries if not entry.startswith(_ISCSI_NAME)),
    )


def _lun(text: str) -> Lun | None:
    _, found, unit = text.partition("        LUN: 1\n")
    if not found:
        return None
    fields = {match["key"]: match["value"] for match in _FIELD.finditer(unit)}
    path = fields["Backing store path"]
    return Lun(
        scsi_id=fields["SCSI ID"].strip(),
        serial=fields["SCSI SN"].strip(),
        size=size_of(int(fields["Size"].split()[0])),
        online=fields["Online"] == "Yes",
        read_only=fields["Readonly"] == "Yes",
        thin=fields["Thin-provisioning"] == "Yes",
        path=None if path == "None" else Path(path),
    )


def shown(size: int) -> int:
    """The figure tgtd prints as "MB" for `size` bytes: neither 10⁶ nor 2²⁰, but its own rounding."""
    sectors = size // 512
    return (sectors - sectors // 625 + 974) // 1950


def size_of(figure: int) -> int:
    """The size in whole MiB that tgtd prints as `figure` (each whole MiB has a figure of its own)."""
    mebibytes = figure * 1950 * 625 // 624 // 2048
    near = range(max(mebibytes - 1, 0), mebibytes + 3)
    return MIB * next((n for n in near if shown(n * MIB) >= figure), mebibytes)
