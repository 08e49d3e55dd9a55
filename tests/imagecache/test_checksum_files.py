"""A SHA256SUMS beside an image: what it says, and whether those signed it who should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blockdev.command import Output
from imagecache.checksum_files import Keys, Stated, find, parse
from imagecache.errors import BadChecksumFile, Unreachable
from imagecache.sandbox import Sandbox
from imagecache.web import Web
from tests.support.marketplace import Marketplace, marketplace
from tests.support.openpgp import Gpg, gpg

SHA256, OTHER, SHA512 = "a" * 64, "b" * 64, "c" * 128
SUMS = f"{OTHER}  other.img\n{SHA256} *disk.img\n".encode()


@dataclass(frozen=True)
class Signers:
    """Keys of which the site has all but mallory's; late's expired long ago."""

    gpg: Gpg
    jane: str
    joe: str
    late: str
    mallory: str
    keyring: Path


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signers]:
    with gpg() as made:
        jane, joe, late, mallory = made.key("jane"), made.key("joe"), made.expired_key("late"), made.key("mallory")
        keyring = made.export(tmp_path_factory.mktemp("keys") / "keyring.gpg", [jane, joe, late])
        yield Signers(made, jane, joe, late, mallory, keyring)


@pytest.fixture
def server() -> Iterator[Marketplace]:
    with marketplace() as started:
        started.publish("/images/disk.img", b"image")
        yield started


@pytest.fixture
def web() -> Web:
    return Web(["127.0.0.1/32"])


def found(server: Marketplace, web: Web, keys: Keys | None = None, signed: bool = False) -> Stated | None:
    return find(f"{server.url}/images/disk.img", web, keys, signed)


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("SHA256SUMS", SUMS.decode(), ("sha256", SHA256)),
        ("SHA512SUMS", f"{SHA512}  ./disk.img\n", ("sha512", SHA512)),
        ("SHA256SUM", f"{SHA256.upper()}  disk.img\r\n", ("sha256", SHA256)),
        ("sha256sum.txt", f"# comment\n{SHA256}  disk.img\n", ("sha256", SHA256)),
        ("CHECKSUM", f"# disk.img: 5 bytes\nSHA256 (disk.img) = {SHA256}\n", ("sha256", SHA256)),
        ("CHECKSUM", f"SHA256 (disk.img) = {SHA256}\nSHA512 (disk.img) = {SHA512}\n", ("sha512", SHA512)),
        ("disk.img.sha256", f"{SHA256}\n", ("sha256", SHA256)),
        ("disk.img.sha256", f"{SHA256}  disk.img\n", ("sha256", SHA256)),
        ("disk.img.sha512", f"{SHA512}", ("sha512", SHA512)),
    ],
)
def test_files_beside(server: Marketplace, web: Web, name: str, text: str, expected: tuple[str, str]) -> None:
    url = server.publish(f"/images/{name}", text.encode())
    assert found(server, web) == Stated(url, *expected, None)


def test_nothing_beside(server: Marketplace, web: Web) -> None:
    assert found(server, web) is None
    assert found(server, web, signed=True) is None
    assert "/images/SHA256SUMS" in server.asked


def test_a_server_that_answers_all_with_a_page(server: Marketplace, web: Web) -> None:
    server.publish("/images/SHA256SUMS", b"<html>not found</html>", "text/html; charset=utf-8")
    assert found(server, web) is None


def test_the_query_of_the_image_is_not_the_files(server: Marketplace, web: Web) -> None:
    server.publish("/images/SHA256SUMS", SUMS)
    stated = find(f"{server.url}/images/disk.img?token=s3cret", web, None, False)
    assert stated
    assert stated.digest == SHA256
    assert not [path for path in server.asked if "s3cret" in path]


def test_a_name_is_looked_for_as_it_is_written(server: Marketplace, web: Web) -> None:
    server.publish("/images/SHA256SUMS", f"{SHA256}  my disk.img\n".encode())
    stated = find(f"{server.url}/images/my%20disk.img", web, None, False)
    assert stated
    assert stated.digest == SHA256


def test_a_name_that_looks_like_a_url_stays_on_the_server(server: Marketplace, web: Web) -> None:
    assert find(f"{server.url}/images/http:%2F%2Fother.example%2Fdisk", web, None, False) is None
    assert find(f"{server.url}/images/other:disk.img", web, None, False) is None
    assert "/images/other:disk.img.sha256" in server.asked


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"{SHA256}  disk.img.gz\n", "does not name"),
        ("", "does not name"),
        ("nonsense\n", "does not name"),
        (f"{SHA256[:-1]}  disk.img\n", "does not name"),
        (f"{SHA256}  disk.img\n{OTHER}  disk.img\n", "more than one thing"),
        (f"{SHA256}\n{SHA256}  other.img\n", "does not name"),
        ("\xff\xfe", "no text"),
        ("x" * ((1 << 20) + 1), "bytes"),
    ],
)
def test_files_that_do_not_help(server: Marketplace, web: Web, text: str, why: str) -> None:
    server.publish("/images/SHA256SUMS", text.encode("latin-1"))
    with pytest.raises(BadChecksumFile, match=why):
        found(server, web)


def test_the_next_file_may_help(server: Marketplace, web: Web) -> None:
    server.publish("/images/SHA512SUMS", b"nonsense\n")
    server.publish("/images/SHA256SUMS", SUMS)
    stated = found(server, web)
    assert stated
    assert stated.digest == SHA256


def test_a_server_that_fails_is_not_one_that_has_none(server: Marketplace, web: Web) -> None:
    gone = Web(["127.0.0.1/32"])
    with pytest.raises(Unreachable):
        find("http://127.0.0.1:1/disk.img", gone, None, False)


def test_lines_by_name() -> None:
    assert parse(f"\\{SHA256}  a\\nb\n{OTHER}  with  spaces\n") == {"a\\nb": {SHA256}, "with  spaces": {OTHER}}


# ---------------------------------------------------------------- who signed it


@pytest.mark.parametrize("suffix", [".gpg", ".sign", ".asc", ".sig"])
def test_a_detached_signature(server: Marketplace, web: Web, signers: Signers, suffix: str) -> None:
    server.publish("/images/SHA256SUMS", SUMS)
    server.publish(f"/images/SHA256SUMS{suffix}", signers.gpg.detached(SUMS, signers.jane, armour=suffix == ".asc"))
    stated = found(server, web, Keys(signers.keyring), signed=True)
    assert stated
    assert (stated.digest, stated.signer) == (SHA256, signers.jane)


def test_an_inline_signature(server: Marketplace, web: Web, signers: Signers) -> None:
    server.publish("/images/CHECKSUM", signers.gpg.inline(SUMS, signers.joe))
    stated = found(server, web, Keys(signers.keyring, (signers.joe,)), signed=True)
    assert stated
    assert (stated.digest, stated.signer) == (SHA256, signers.joe)


def test_only_what_was_signed_inline_is_read(server: Marketplace, web: Web, signers: Signers) -> None:
    signed = signers.gpg.inline(f"{OTHER}  other.img\n".encode(), signers.jane)
    for forged in (
        SUMS + signed,
        signed + SUMS,
        signed.replace(b"-----BEGIN PGP SIGNATURE", SUMS + b"-----BEGIN PGP SIGNATURE"),
    ):
        server.publish("/images/CHECKSUM", forged)
        with pytest.raises(BadChecksumFile):
            found(server, web, Keys(signers.keyring), signed=True)


def test_one_good_signature_of_several(server: Marketplace, web: Web, signers: Signers) -> None:
    server.publish("/images/SHA256SUMS", SUMS)
    server.publish("/images/SHA256SUMS.gpg", signers.gpg.detached(SUMS, signers.mallory, signers.joe))
    stated = found(server, web, Keys(signers.keyring, (signers.joe,)), signed=True)
    assert stated
    assert stated.signer == signers.joe


def test_fingerprints_may_be_written_with_spaces(server: Marketplace, web: Web, signers: Signers) -> None:
    server.publish("/images/SHA256SUMS", SUMS)
    server.publish("/images/SHA256SUMS.gpg", signers.gpg.detached(SUMS, signers.jane))
    written = " ".join(signers.jane[start : start + 4] for start in range(0, 40, 4)).lower()
    assert found(server, web, Keys(signers.keyring, (written,)), signed=True)


@pytest.mark.parametrize("required", [True, False])
def test_bad_signatures_are_never_passed_over(server: Marketplace, web: Web, signers: Signers, required: bool) -> None:
    good = signers.gpg.detached(SUMS, signers.jane)
    tampered = SUMS.replace(b"disk.img", b"xxxx.img").replace(b"other.img", b"disk.img")
    cases = {
        "BADSIG": (tampered, good, Keys(signers.keyring)),
        "ERRSIG": (SUMS, signers.gpg.detached(SUMS, signers.mallory), Keys(signers.keyring)),
        "another key": (SUMS, good, Keys(signers.keyring, (signers.joe,))),
        "no signature": (SUMS, b"nonsense", Keys(signers.keyring)),
        "EXPKEYSIG": (SUMS, signers.gpg.detached_in_2020(SUMS, signers.late), Keys(signers.keyring)),
    }
    for why, (body, signature, keys) in cases.items():
        server.publish("/images/SHA256SUMS", body)
        server.publish("/images/SHA256SUMS.gpg", signature)
        with pytest.raises(BadChecksumFile, match=why):
            found(server, web, keys, required)


def test_unsigned_where_a_signature_is_required(server: Marketplace, web: Web, signers: Signers) -> None:
    server.publish("/images/SHA256SUMS", SUMS)
    with pytest.raises(BadChecksumFile, match="not signed"):
        found(server, web, Keys(signers.keyring), signed=True)
    with pytest.raises(BadChecksumFile, match="no keyring"):
        found(server, web, None, signed=True)
    stated = found(server, web, Keys(signers.keyring))
    assert stated
    assert stated.signer is None


def test_a_signed_digest_without_a_name_is_of_no_image(server: Marketplace, web: Web, signers: Signers) -> None:
    """A mirror could put it, and what it is of, beside another name."""
    bare = f"{SHA256}\n".encode()
    server.publish("/images/disk.img.sha256", bare)
    server.publish("/images/disk.img.sha256.sig", signers.gpg.detached(bare, signers.jane))
    with pytest.raises(BadChecksumFile, match="does not name"):
        found(server, web, Keys(signers.keyring), signed=True)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_inline_signatures_none_lends_itself_to_the_other(
    server: Marketplace, web: Web, signers: Signers, order: int
) -> None:
    good = signers.gpg.inline(f"{OTHER}  other.img\n".encode(), signers.jane)
    forged = signers.gpg.inline(SUMS, signers.mallory)
    server.publish("/images/CHECKSUM", b"".join([good, forged][::order]))
    with pytest.raises(BadChecksumFile):
        found(server, web, Keys(signers.keyring), signed=True)


def test_a_keyring_that_only_its_owner_reads_is_enough(
    server: Marketplace, web: Web, signers: Signers, tmp_path: Path
) -> None:
    mine = tmp_path / "keyring"
    mine.write_bytes(signers.keyring.read_bytes())
    mine.chmod(0o600)
    server.publish("/images/CHECKSUM", signers.gpg.inline(SUMS, signers.jane))
    assert found(server, web, Keys(mine), signed=True)


def test_signatures_are_read_in_the_sandbox(server: Marketplace, web: Web, signers: Signers) -> None:
    ran = []

    class Watched(Sandbox):
        def run(self, argv: Sequence[str], **options: Any) -> Output:
            ran.append(argv[0])
            return super().run(argv, **options)

    server.publish("/images/CHECKSUM", signers.gpg.inline(SUMS, signers.jane))
    assert found(server, web, Keys(signers.keyring, sandbox=Watched()))
    assert ran == ["gpgv"]
