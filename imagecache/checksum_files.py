"""A SHA256SUMS beside an image: found, its signature verified where there is one, and read.

Signed as Debian and Ubuntu do it (a detached SHA256SUMS.gpg, .sign or .asc) or as Fedora does (inline). gpgv with the
site's own keyring verifies, in the sandbox; a signature counts by the fingerprint of its key and nothing else.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from blockdev.command import CommandFailed

from .addresses import shown
from .entries import DIGEST_LENGTH
from .errors import BadChecksumFile, TooLarge, Unreachable
from .sandbox import Limits, Sandbox
from .web import Document, Web

MAX_BYTES = 1 << 20
MAX_SIGNATURE = 64 << 10
TIMEOUT = 20.0
"""Seconds for gpgv."""

_NAMES = ("SHA512SUMS", "SHA256SUMS", "SHA256SUM", "sha256sum.txt", "CHECKSUM")
_SIGNATURES = (".gpg", ".sign", ".asc", ".sig")
_INLINE = b"-----BEGIN PGP SIGNED MESSAGE-----"
_ABSENT = (403, 404, 410)
#: RFC 9580, 9.5: MD5, SHA-1, RIPEMD-160
_WEAK_HASHES = ("1", "2", "3")

_GNU = re.compile(r"\\?([0-9a-fA-F]{64}|[0-9a-fA-F]{128}|[0-9a-fA-F]{40}) [ *](?:\./)?(\S.*)")
_BSD = re.compile(r"SHA(?:1|256|512) \((.+)\) = ([0-9a-fA-F]{40,128})")
_BARE = re.compile(r"([0-9a-fA-F]{64}|[0-9a-fA-F]{128})")

Check = Callable[[], None]


@dataclass(frozen=True)
class Keys:
    """Who may sign: keys in `keyring` (as `gpg --export` writes it), of these only those with a fingerprint in
    `fingerprints` if there are any. gpgv reads signatures of strangers in `sandbox`."""

    keyring: Path
    fingerprints: tuple[str, ...] = ()
    sandbox: Sandbox = field(default_factory=Sandbox)

    def accepts(self, fingerprints: Iterable[str]) -> bool:
        wanted = {text.replace(" ", "").upper() for text in self.fingerprints}
        return not wanted or not wanted.isdisjoint(fingerprints)


@dataclass(frozen=True)
class Stated:
    """What a file of checksums says about one image. `source` is the file, for people; `signer` the fingerprint of the
    key that signed it, None for an unsigned one."""

    source: str
    algorithm: str
    digest: str
    signer: str | None


def find(url: str, web: Web, keys: Keys | None, require_signed: bool, check: Check = lambda: None) -> Stated | None:
    """What stands beside the image at `url`; None if nothing does. With `keys`, a signature that is there is verified.

    Raises BadChecksumFile: files are there but none names the image, is readable, or is signed although
    `require_signed`; Unreachable and its like when it cannot be told.
    """
    written = urlsplit(url).path.rpartition("/")[2]
    name = unquote(written)
    complaints = []
    for candidate in (*_NAMES, f"{written}.sha256", f"{written}.sha512") if name else ():
        document = _read(web, urljoin(_bare(url), f"./{candidate}"), MAX_BYTES, check)
        if document is None:
            continue
        try:
            text, signer = _signed_text(document, web, keys, require_signed, check)
            algorithm, digest = _named(parse(text), name, signer is None, shown(document.url))
            return Stated(shown(document.url), algorithm, digest, signer)
        except BadChecksumFile as error:
            complaints.append(str(error))
    if complaints:
        raise BadChecksumFile("; ".join(complaints))
    return None


def _bare(url: str) -> str:
    return url.partition("?")[0].partition("#")[0]


def _read(web: Web, url: str, limit: int, check: Check) -> Document | None:
    """None for what is not there; a server that answers every path with a page has nothing there either."""
    try:
        document = web.read(url, limit, check=check)
    except Unreachable as error:
        if error.status in _ABSENT:
            return None
        raise
    except TooLarge as error:
        raise BadChecksumFile(str(error)) from None
    return None if document.content_type.startswith("text/html") else document


def parse(text: str) -> dict[str, set[str]]:
    """Digests by file name, as sha256sum(1) writes them in both of its ways; a digest alone is of the name "".
    Lines that are neither are passed over: Fedora's have comments, inline signatures armour."""
    found: dict[str, set[str]] = {}
    for line in map(str.rstrip, text.splitlines()):
        if match := _GNU.fullmatch(line):
            found.setdefault(match[2], set()).add(match[1].lower())
        elif match := _BSD.fullmatch(line):
            found.setdefault(match[1], set()).add(match[2].lower())
        elif match := _BARE.fullmatch(line):
            found.setdefault("", set()).add(match[1].lower())
    return found


def _named(files: dict[str, set[str]], name: str, bare: bool, source: str) -> tuple[str, str]:
    """What the file says about `name`, or, if it may be a `bare` digest, what it says. A signed one may not: it would
    be as true beside any other image."""
    by_length = {length: algorithm for algorithm, length in DIGEST_LENGTH.items()}
    digests = sorted(
        files.get(name) or (files.get("", set()) if bare and len(files) == 1 else set()), key=len, reverse=True
    )
    if not digests:
        raise BadChecksumFile(f"{source}: does not name {name}")
    if len({len(digest) for digest in digests}) != len(digests) or len(digests[0]) not in by_length:
        raise BadChecksumFile(f"{source}: says more than one thing about {name}")
    return by_length[len(digests[0])], digests[0]


# ---------------------------------------------------------------- signatures


def _signed_text(
    document: Document, web: Web, keys: Keys | None, require_signed: bool, check: Check
) -> tuple[str, str | None]:
    """The text, only what was signed where something was, and by whom."""
    source = shown(document.url)
    if keys is None:
        if require_signed:
            raise BadChecksumFile(f"{source}: signatures are required, and the site has no keyring")
        return _text(document.body, source), None
    if document.body.lstrip().startswith(_INLINE):
        body, signer = _verify(document.body, None, keys, source)
        return _text(body, source), signer
    for suffix in _SIGNATURES:
        signature = _read(web, _bare(document.url) + suffix, MAX_SIGNATURE, check)
        if signature is not None:
            body, signer = _verify(document.body, signature.body, keys, source)
            return _text(body, source), signer
    if require_signed:
        raise BadChecksumFile(f"{source}: not signed")
    return _text(document.body, source), None


def _text(body: bytes, source: str) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise BadChecksumFile(f"{source}: no text") from None


def _verify(body: bytes, signature: bytes | None, keys: Keys, source: str) -> tuple[bytes, str]:
    """What was signed (of an inline signature: only that), and the fingerprint that signed. Raises BadChecksumFile."""
    with tempfile.TemporaryDirectory() as name:
        given = {"/keyring": keys.keyring.read_bytes(), "/body": body}
        if signature is not None:
            given["/signature"] = signature
        read = {place: _put(Path(name) / place[1:], data) for place, data in given.items()}
        signed = _put(Path(name) / "signed", b"")
        status = _gpgv(keys.sandbox, read, signed)
        valid = [found for found in _valid(status) if keys.accepts(found)]
        if not valid:
            raise BadChecksumFile(f"{source}: not signed by a key that the site accepts ({_reason(status)})")
        return (body if signature is not None else signed.read_bytes()), valid[0][0]


def _put(path: Path, data: bytes) -> Path:
    """A file that the sandbox's user may read; its directory is closed."""
    path.write_bytes(data)
    path.chmod(0o644)
    return path


def _gpgv(sandbox: Sandbox, read: Mapping[str, Path], signed: Path) -> list[list[str]]:
    """What gpgv says, in words. Its exit code is of all signatures together; one that counts is enough."""
    files = ["/signature", "/body"] if "/signature" in read else ["--output", "/signed", "/body"]
    argv = ["gpgv", "--status-fd", "1", "--homedir", "/tmp", "--keyring", "/keyring", *files]
    limits = Limits(file_size=2 * MAX_BYTES)
    try:
        output = sandbox.run(argv, read=read, write={"/signed": signed}, limits=limits, timeout=TIMEOUT).stdout
    except CommandFailed as error:
        output = error.stdout
    return [line.split()[1:] for line in output.splitlines() if line.startswith("[GNUPG:] ")]


def _valid(status: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    """Fingerprints (of the key, and of its primary key) of good signatures. gpgv says VALIDSIG also after EXPKEYSIG and
    REVKEYSIG (doc/DETAILS of GnuPG), so the line before counts."""
    good = False
    for word, *rest in status:
        if word == "VALIDSIG":
            if good and len(rest) >= 10 and rest[7] not in _WEAK_HASHES:
                yield [rest[0], rest[9]]
            good = False
        elif word in ("GOODSIG", "NEWSIG", "BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG"):
            good = word == "GOODSIG"


def _reason(status: Iterable[Sequence[str]]) -> str:
    words = [line[0] for line in status if line]
    told = [word for word in words if word.endswith("SIG") and word not in ("NEWSIG", "GOODSIG", "VALIDSIG")]
    return ", ".join(told) or ("of another key" if "VALIDSIG" in words else "no signature")
