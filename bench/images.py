"""A cold image from a web server on loopback: verified on the disk, and committed to the cache as qcow2.

Beside what a script of curl, tee, sha256sum and qemu-img takes for the same bytes, in turn with it, round by round.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from uuid import uuid4

from bench.report import Table
from imagecache.cache import Cache
from imagecache.fetch import Wanted, fetch
from imagecache.inspect import ImageLimits
from imagecache.sandbox import Sandbox
from imagecache.store import Store
from imagecache.web import Web

MIB = 1 << 20
GIB = 1 << 30
SCRIPT = Path(__file__).with_name("bare_fetch.sh")
PACK = {"raw": None, "gz": ["gzip", "-c"], "zst": ["zstd", "-q", "-c"]}
AIM = 1.15


@dataclass
class Case:
    """An image as it is offered, and the seconds of each round, by what was done."""

    compression: str
    url: str
    stored: int
    size: int
    digest: str
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def wanted(self) -> Wanted:
        told = None if self.compression == "raw" else self.compression
        return Wanted((self.url,), {"sha256": self.digest}, self.size, told, 2 * self.size)

    def median(self, what: str) -> float:
        return median(self.seconds[what])

    def ratio(self, what: str, other: str) -> float:
        """Median of the rounds' own ratios."""
        return median(a / b for a, b in zip(self.seconds[what], self.seconds[other], strict=True))


def run(work: Path, *, quick: bool) -> list[Table]:
    size, rounds = (96 * MIB, 2) if quick else (2 * GIB, 5)
    origin = work / "origin"
    origin.mkdir()
    with _nginx(work, origin) as url:
        cases = list(_cases(origin, url, size))
        acts = _acts(work)
        for _ in range(rounds):
            for case in cases:
                for what, act in acts.items():
                    case.seconds.setdefault(what, []).append(_timed(act, case, work))
    shutil.rmtree(origin)
    return [_verified(cases), _committed(cases)]


def _cases(origin: Path, url: str, size: int) -> Iterator[Case]:
    raw = origin / "image.raw"
    digest = _operating_system(raw, size)
    for compression, pack in PACK.items():
        path = origin / f"image.{compression}"
        if pack is not None:
            with raw.open("rb") as source, path.open("wb") as target:
                subprocess.run(pack, stdin=source, stdout=target, check=True)
        yield Case(compression, f"{url}/{path.name}", path.stat().st_size, size, digest)


def _operating_system(path: Path, size: int) -> str:
    """A file of what this machine's files hold, as a disk image does: programs, libraries, texts. Its SHA-256."""
    digest, left = hashlib.sha256(), size
    with path.open("wb") as target:
        for source in _files():
            data = source.read_bytes()[:left]
            target.write(data)
            digest.update(data)
            left -= len(data)
            if not left:
                return digest.hexdigest()
        rest = os.urandom(left)  # a small machine
        target.write(rest)
        digest.update(rest)
    return digest.hexdigest()


def _files() -> Iterator[Path]:
    for directory, _, names in os.walk("/usr"):
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield path


@contextmanager
def _nginx(work: Path, root: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = work / "nginx.conf"
    config.write_text(
        f"daemon off; pid {work}/nginx.pid; user root; worker_processes 1; error_log stderr error;\n"
        "events {}\n"
        f"http {{ access_log off; sendfile on; server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    process = subprocess.Popen(["nginx", "-p", str(work), "-c", str(config)])
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError(f"nginx does not listen at {port}")


Act = Callable[[Case, Path], object]


def _acts(work: Path) -> dict[str, Act]:
    """Each brings a cold image into an empty directory."""
    web, sandbox = Web(["127.0.0.1/32"]), Sandbox()

    def ours(case: Case, place: Path) -> None:
        fetch(web, sandbox, case.wanted, place / "image", lambda done, total: None)

    def committed(case: Case, place: Path) -> None:
        cache = Cache(place)
        cache.activate()
        store = Store(cache, web, sandbox, ImageLimits(2 * case.size, 2 * case.size))
        store.add(uuid4(), case.wanted, "raw", lambda done, total: None)

    def script(hasher: str, *, qcow2: bool) -> Act:
        def bare(case: Case, place: Path) -> None:
            files = [place / "image", *([place / "image.qcow2"] if qcow2 else [])]
            subprocess.run([SCRIPT, case.url, case.compression, case.digest, hasher, *files], check=True)

        return bare

    return {
        "verified": ours,
        "script": script("sha256sum", qcow2=False),
        "faster script": script("openssl", qcow2=False),
        "committed": committed,
        "script, qcow2": script("sha256sum", qcow2=True),
        "faster script, qcow2": script("openssl", qcow2=True),
    }


def _timed(act: Act, case: Case, work: Path) -> float:
    """Nothing of an earlier round waits to be written, and its files are gone."""
    place = work / "place"
    place.mkdir()
    os.sync()
    began = time.perf_counter()
    act(case, place)
    taken = time.perf_counter() - began
    shutil.rmtree(place)
    return taken


def _verified(cases: list[Case]) -> Table:
    table = _table(cases, "Cold image, verified and durable", "verified", "script", "faster script")
    table.notes += [
        "script: `curl | tee FILE | sha256sum` (after curl, `gzip -d` or `zstd -d`) and fsync; the same bytes kept.",
        f"Medians; ratios are medians of the rounds' own. Aim: at most {AIM} times the script.",
        "faster script: `openssl dgst -sha256` in the place of sha256sum, which on some systems does not use the CPU's "
        "own instructions.",
    ]
    return table


def _committed(cases: list[Case]) -> Table:
    table = _table(cases, "Cold image, committed as qcow2", "committed", "script, qcow2", "faster script, qcow2")
    table.notes += [
        "committed: fetched, inspected and flattened in the sandbox, its digest taken, renamed into the cache. script: "
        f"the above, then `qemu-img convert -O qcow2` and fsync. Aim: at most {AIM} times the script."
    ]
    return table


def _table(cases: list[Case], title: str, ours: str, script: str, faster: str) -> Table:
    columns = ("image", "size, MiB", "as sent, MiB", "ours, s", "script, s", "ratio", "faster script, s", "ratio to it")
    table = Table(title, columns)
    for case in cases:
        sizes = (case.size // MIB, case.stored // MIB)
        figures = (case.median(ours), case.median(script), case.ratio(ours, script))
        table.add(case.compression, *sizes, *figures, case.median(faster), case.ratio(ours, faster))
    return table
