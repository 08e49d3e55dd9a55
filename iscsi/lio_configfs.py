"""Where LIO keeps what, and how it is read: plain files under configfs. Looking creates nothing, and for one volume
lists nothing but its own.

    core/iblock_<slot>/<iqn>/                     the backstore, called like its target
    iscsi/<iqn>/tpgt_1/                           the portal group: attrib/ param/ enable np/<host>:<port>
        lun/lun_1/<link>                          -> the backstore
        acls/<initiator>/{auth/,info,lun_1/<link>}    -> the LUN
    iscsi/<iqn>/fabric_statistics/                how many sessions there are

Who deletes an ACL or a portal waits for the last session and the last half-made login of it, and an initiator that
sends one request and then nothing makes one that lasts. Who lists the ACLs or the portals meanwhile waits too. So a
group that is *dead*, closed with a LUN that leads nowhere, is never looked into; in one that lives a mark tells that
something of it is being deleted. LIO gives its portals to no other group of the target before it is gone.

rtslib finds a backstore by listing all of them. We give each a slot that follows from the volume's id, far above those
that rtslib and targetcli hand out from 0 upwards.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from iscsi.names import LUN

ROOT = "/sys/kernel/config"
CORE = f"{ROOT}/target/core"
FABRIC = f"{ROOT}/target/iscsi"

_SETTLING = f"lun_{LUN + 1}"  # the mark: a LUN that leads nowhere
_PROBES = 4  # slots to try: two volumes of one slot meet once in 30,000 hosts with 500 exports
_DEVICE = re.compile(r".*readonly: (\d).*\n\s*Major: (\d+) Minor: (\d+)  CLAIMED")
_NOT_TARGETS = ("discovery_auth",)  # the one directory of the fabric that is none


def read(path: str) -> str:
    """A file of configfs without its line end; empty when it is not there."""
    try:
        with open(path) as file:
            return file.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def write(path: str, value: str) -> None:
    """Raises OSError, with the kernel's reason."""
    with open(path, "w") as file:
        file.write(value)


def put(path: str, wanted: dict[str, str]) -> bool:
    """Write those files of the directory `path` that differ; says whether any did."""
    different = {name: value for name, value in wanted.items() if read(f"{path}/{name}") != value}
    for name, value in different.items():
        write(f"{path}/{name}", value)
    return bool(different)


def entries(path: str) -> list[str]:
    """The names of the directories in `path`; none when it is not there."""
    try:
        with os.scandir(path) as found:
            return sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def link(path: str) -> tuple[str, str] | None:
    """(name, where it leads) of the one symbolic link in the directory `path`."""
    try:
        with os.scandir(path) as found:
            name = next((entry.name for entry in found if entry.is_symlink()), None)
            return (name, os.path.normpath(f"{path}/{os.readlink(f'{path}/{name}')}")) if name else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def target_names() -> list[str]:
    return [name for name in entries(FABRIC) if name not in _NOT_TARGETS]


def backstore_names() -> Iterator[tuple[str, str]]:
    """(slot, name) of every backstore of any kind."""
    for slot in entries(CORE):
        if slot != "alua":
            yield from ((slot, name) for name in entries(f"{CORE}/{slot}"))


def slots(volume_id: UUID) -> list[int]:
    """Where a volume's backstore may lie, the first choice first."""
    first = zlib.crc32(volume_id.bytes) >> 1
    return [(first + number) % (1 << 31) | 1 << 31 for number in range(_PROBES)]


@dataclass(frozen=True)
class Backstore:
    """A storage object. `device` is the number of its block device, None while it has none; `claim` is the path it was
    made for."""

    path: str
    enabled: bool
    device: int | None
    read_only: bool
    identity: tuple[str, str, str, str]
    claim: str

    @property
    def size(self) -> int:
        """The bytes that initiators are told."""
        return int(read(f"{self._sysfs}/size") or 0) * 512 if self.device is not None else 0

    @property
    def node(self) -> Path:
        """The device's name in /dev."""
        return Path("/dev", os.path.basename(os.path.realpath(self._sysfs)).replace("!", "/"))

    @property
    def honours_fua(self) -> bool:
        return read(f"{self._sysfs}/queue/fua") == "1"

    @property
    def discards(self) -> bool:
        return read(f"{self.path}/attrib/max_unmap_block_desc_count") not in ("", "0")

    @property
    def _sysfs(self) -> str:
        assert self.device is not None
        return f"/sys/dev/block/{os.major(self.device)}:{os.minor(self.device)}"


@dataclass(frozen=True)
class Acl:
    """What one initiator may do. `chap`: it has to prove its name; `mapped`: it has the LUN."""

    initiator: str
    username: str
    password: str = field(repr=False)
    mutual_username: str
    mutual_password: str = field(repr=False)
    chap: bool
    mapped: bool
    read_only: bool

    @property
    def revoked(self) -> bool:
        return not (self.mapped or self.username or self.password)

    @property
    def complete(self) -> bool:
        return self.chap and self.mapped and bool(self.username and self.password)


def backstore(path: str) -> Backstore | None:
    """The storage object in the directory `path`."""
    if not os.path.isdir(path):
        return None
    found = _DEVICE.findall(read(f"{path}/info"))  # what the kernel writes comes last, after the path
    read_only, major, minor = map(int, found[-1]) if found else (0, 0, 0)
    return Backstore(
        path=path,
        enabled=read(f"{path}/enable") == "1",
        device=os.makedev(major, minor) if major else None,
        read_only=bool(read_only),
        identity=(
            read(f"{path}/wwn/vpd_unit_serial").rpartition(":")[2].strip(),
            read(f"{path}/wwn/vendor_id"),
            read(f"{path}/wwn/product_id"),
            read(f"{path}/wwn/revision"),
        ),
        claim=read(f"{path}/udev_path"),
    )


def _secret(path: str) -> str:
    """ "NULL" is how LIO tells that there is none."""
    value = read(path)
    return "" if value == "NULL" else value


class Volume:
    """The paths of one volume's layers, and what is in them."""

    def __init__(self, volume_id: UUID, iqn: str) -> None:
        self.id, self.iqn = volume_id, iqn
        self.target = f"{FABRIC}/{iqn}"
        self.group = f"{self.target}/tpgt_1"
        self.lun = f"{self.group}/lun/lun_{LUN}"
        self.mark = f"{self.group}/lun/{_SETTLING}"

    def dead(self) -> bool:
        """Whether the group leads to no byte any more; see above."""
        return read(f"{self.group}/enable") == "0" and self.exported() is None

    def settling(self) -> bool:
        return os.path.isdir(self.mark)

    def backstore(self) -> Backstore | None:
        found = (backstore(f"{CORE}/iblock_{slot}/{self.iqn}") for slot in slots(self.id))
        return next(filter(None, found), None)

    def exported(self) -> tuple[str, str] | None:
        """(name of the link, path of the backstore) of the LUN."""
        return link(self.lun)

    def enabled(self) -> bool:
        return read(f"{self.group}/enable") == "1"

    def portals(self) -> list[str]:
        """None while they cannot be listed."""
        return [] if self.settling() or self.dead() else entries(f"{self.group}/np")

    def initiators(self) -> list[str]:
        """None while they cannot be listed."""
        return [] if self.settling() or self.dead() else entries(f"{self.group}/acls")

    def acl_path(self, initiator: str) -> str:
        return f"{self.group}/acls/{initiator}"

    def acls(self) -> list[Acl]:
        return [self.acl(initiator) for initiator in self.initiators()]

    def acl(self, initiator: str) -> Acl:
        path = self.acl_path(initiator)
        mapped = link(f"{path}/lun_{LUN}")
        return Acl(
            initiator=initiator,
            username=_secret(f"{path}/auth/userid"),
            password=_secret(f"{path}/auth/password"),
            mutual_username=_secret(f"{path}/auth/userid_mutual"),
            mutual_password=_secret(f"{path}/auth/password_mutual"),
            chap=read(f"{path}/attrib/authentication") != "0",  # -1: as the group says, which older kernels do always
            mapped=mapped is not None and mapped[1] == self.lun,
            read_only=read(f"{path}/lun_{LUN}/write_protect") == "1",
        )

    def tid(self) -> int:
        """The volume's number, kept in the name of the link; 0 while there is none."""
        name, _ = self.exported() or ("", "")
        return int(name[4:]) if re.fullmatch(r"tid-\d+", name) else 0
