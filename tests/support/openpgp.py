"""Keys and signatures by a real gpg with a home of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Gpg:
    def __init__(self, home: Path) -> None:
        self._home = home

    def _run(self, *arguments: str, data: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", str(self._home), "--batch", "--quiet", "--pinentry-mode", "loopback"]
        done = subprocess.run(
            [*argv, "--passphrase", "", *arguments], input=data, capture_output=True, check=True, timeout=60
        )
        return done.stdout

    def key(self, name: str) -> str:
        """A new signing key; its fingerprint."""
        self._run("--quick-generate-key", f"{name}@example.org", "ed25519", "sign", "never")
        return self.fingerprint(name)

    def expired_key(self, name: str) -> str:
        """One that lived on 1 January 2020."""
        at = ("--faked-system-time", "20200101T000000!")
        self._run(*at, "--quick-generate-key", f"{name}@example.org", "ed25519", "sign", "1d")
        return self.fingerprint(name)

    def fingerprint(self, name: str) -> str:
        listed = self._run("--with-colons", "--list-keys", f"={name}@example.org").decode()
        return next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))

    def export(self, path: Path, fingerprints: Sequence[str]) -> Path:
        path.write_bytes(self._run("--export", *fingerprints))
        return path

    def detached(self, data: bytes, *fingerprints: str, armour: bool = False) -> bytes:
        users = [word for fingerprint in fingerprints for word in ("--local-user", fingerprint)]
        return self._run(*users, *(["--armor"] if armour else []), "--detach-sign", data=data)

    def inline(self, data: bytes, fingerprint: str) -> bytes:
        return self._run("--local-user", fingerprint, "--clear-sign", data=data)

    def detached_in_2020(self, data: bytes, fingerprint: str) -> bytes:
        """Signed while an expired key lived."""
        at = ("--faked-system-time", "20200101T120000!")
        return self._run(*at, "--local-user", fingerprint, "--detach-sign", data=data)

    def stop(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self._home), "--kill", "all"], check=True, timeout=60)


@contextmanager
def gpg() -> Iterator[Gpg]:
    """Its agent's socket wants a short path."""
    home = Path(tempfile.mkdtemp(prefix="gpg-"))
    made = Gpg(home)
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(home, ignore_errors=True)
