"""A small disk with a real Debian on it that boots from a BIOS: built once by `scripts/setup tests`, into .image/.

    .image/debian.raw       MBR, GRUB, one ext4 partition; logs to its first serial port and asks there for a login
    .image/debian.qcow2     and .raw.gz, .raw.xz, .raw.zst: the same, as people publish images
    .image/.complete        written last

Root builds it: mmdebstrap from the host's own apt sources, mkfs.ext4 -d for the file system, and the disk around it by
hand, so that nothing is mounted and no loop device is needed.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = Path(__file__).parents[2] / ".image"
RAW = IMAGES / "debian.raw"
QCOW2 = IMAGES / "debian.qcow2"
COMPRESSED = {name: IMAGES / f"debian.raw.{name}" for name in ("gz", "xz", "zst")}
HOSTNAME = "image-test"

SIZE = 480 << 20
_START = 1 << 20
_SECTOR = 512
_PACKAGES = "linux-image-cloud-amd64,systemd-sysv,udev,grub-pc-bin,grub-common"
_UNWANTED = ("share/doc", "share/man", "share/locale", "share/info", "share/zoneinfo", "lib/udev/hwdb.d")
_ROOT_UUID = "5f1d6a3e-0c1b-4c57-9a44-6d2f6f0d2b10"
_GRUB_CONFIG = f"""\
serial --unit=0
terminal_output serial
linux /vmlinuz root=UUID={_ROOT_UUID} ro console=ttyS0 quiet
initrd /initrd.img
boot
"""


def build(home: Path) -> None:
    """All of it, in `home`, from nothing. Takes about a minute of work. Raises CalledProcessError, OSError."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    raw = home / RAW.name
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        root = Path(scratch, "root")
        _bootstrap(root)
        core = _configured(root)
        _make_disk(raw, root, core)
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, home / QCOW2.name)
    _publish(raw)
    (home / ".complete").touch()


def _bootstrap(root: Path) -> None:
    excludes = [f"--dpkgopt=path-exclude=/usr/{name}/*" for name in _UNWANTED]
    sources = [path for path in _sources() if path.stat().st_size]
    _run(
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={_PACKAGES}", *excludes,
        _codename(), root, *sources,
    )  # fmt: skip


def _sources() -> list[Path]:
    apt = Path("/etc/apt")
    more = sorted(path for path in (apt / "sources.list.d").glob("*") if path.suffix in (".list", ".sources"))
    return [path for path in (apt / "sources.list", *more) if path.exists()]


def _codename() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)["VERSION_CODENAME"].strip('"')


def _configured(root: Path) -> bytes:
    """Write what is this system's own; return GRUB's core, which finds the partition and reads its configuration."""
    (root / "etc/fstab").write_text(f"UUID={_ROOT_UUID} / ext4 defaults 0 1\n")
    (root / "etc/hostname").write_text(f"{HOSTNAME}\n")
    shutil.rmtree(root / "var/lib/apt/lists")
    (root / "boot/grub").mkdir(exist_ok=True)
    (root / "boot/grub/grub.cfg").write_text(_GRUB_CONFIG)
    _run(
        "chroot", root, "grub-mkimage", "-O", "i386-pc", "-o", "/boot/core.img", "-p", "(hd0,msdos1)/boot/grub",
        "biosdisk", "part_msdos", "ext2", "normal", "linux", "serial", "terminal", "echo", "boot",
    )  # fmt: skip
    return (root / "boot/core.img").read_bytes()


def _make_disk(raw: Path, root: Path, core: bytes) -> None:
    """The boot sector loads what follows it, which ends before the partition: where grub-install puts it too."""
    assert len(core) < _START - _SECTOR
    boot = (root / "usr/lib/grub/i386-pc/boot.img").read_bytes()[:440]
    entry = struct.pack(
        "<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", _START // 512, (SIZE - _START) // 512
    )
    with raw.open("wb") as disk:
        disk.write(boot.ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa" + core)
        disk.truncate(SIZE)
    _run(
        "mkfs.ext4", "-q", "-F", "-U", _ROOT_UUID, "-E", f"offset={_START}", "-d", root, raw,
        f"{(SIZE - _START) // 1024}k",
    )  # fmt: skip


def _publish(raw: Path) -> None:
    """Quickly rather than small."""
    for argv in (["gzip", "-1", "-k"], ["xz", "-0", "-T0", "-k"], ["zstd", "-q", "-T0"]):
        _run(*argv, raw)


def _run(*argv: str | Path) -> None:
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, env={**os.environ, "PATH": path, "LC_ALL": "C"})


if __name__ == "__main__":
    if not (IMAGES / ".complete").exists():
        if os.geteuid() != 0:
            sys.exit("only root can build the disk image that the tests need")
        build(IMAGES)
