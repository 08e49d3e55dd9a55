"""The kernel's own NFS server, with one export for one client on loopback: for the test kernel, as root.

What exportfs(8) and mountd(8) would tell the kernel is written into its caches by hand: no other program is needed.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: include/uapi/linux/nfsd/export.h: READONLY, INSECURE_PORT, NOSUBTREECHECK, FSID; root is squashed.
_FLAGS = 0x1 | 0x2 | 0x4 | 0x400 | 0x2000
_NOBODY = 65534
_SERVER, _CACHES = Path("/proc/fs/nfsd"), Path("/proc/net/rpc")
#: The file system "0" is the root of NFSv4, RFC 8881 §7.3; kinds of ids: fs/nfsd/nfsfh.h.
_ROOT = r"1 \x00000000"


@contextmanager
def exported_read_only(directory: Path) -> Iterator[tuple[str, ...]]:
    """Serve `directory`, on a file system that can be exported, while the block runs; the arguments of mount(8) for a
    client, but for the place."""
    for module in ("nfsd", "nfsv4"):
        subprocess.run(["modprobe", module], check=True)
    Path("/var/lib/nfs/v4recovery").mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "nfsd", "nfsd", _SERVER], check=True)
    end = int(time.time()) + 86400
    _tell(_CACHES / "auth.unix.ip/channel", f"nfsd 127.0.0.1 {end} here")
    _tell(_CACHES / "nfsd.export/channel", f"here {directory} {end} {_FLAGS} {_NOBODY} {_NOBODY} 0")
    _tell(_CACHES / "nfsd.fh/channel", f"here {_ROOT} {end} {directory}")
    _tell(_SERVER / "versions", "-3 +4 +4.1 +4.2")
    _tell(_SERVER / "portlist", "tcp 2049")
    _tell(_SERVER / "threads", "2")
    _tell(_SERVER / "v4_end_grace", "Y")  # nobody has anything to reclaim
    try:
        yield "-i", "-t", "nfs4", "-o", "ro,vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1", "127.0.0.1:/"
    finally:
        _tell(_SERVER / "threads", "0")
        for cache in ("auth.unix.ip", "nfsd.export", "nfsd.fh"):
            _tell(_CACHES / cache / "flush", str(int(time.time()) + 1))
        subprocess.run(["umount", _SERVER], check=True)


def _tell(file: Path, line: str) -> None:
    """In one write, as the kernel wants it."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
