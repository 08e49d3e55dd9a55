"""All kinds of references, against a Marketplace and a file server that are real."""

from __future__ import annotations

import datetime as dt
import hashlib
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from imagecache.entries import Entry, Fetched
from imagecache.errors import (
    AddressRefused,
    BadChecksumFile,
    BadMetadata,
    BadReference,
    BadSignature,
    BadUrl,
    NoEntry,
    Unreachable,
    WrongDigest,
)
from imagecache.identifiers import identifier_of
from imagecache.policy import Policy, judge
from imagecache.resolve import Resolution, Resolver, Sources, read_checksum, take_checksums
from imagecache.signatures import Trust
from imagecache.web import Web
from tests.support.endorsements import Authority, Endorser, entry, sign
from tests.support.marketplace import Marketplace, marketplace
from tests.support.openpgp import gpg
from tests.support.wire import Wire, wire

IMAGE = b"\x51\x46\x49\xfb an image" * 100
OTHER = b"another image"
IDENTIFIER = identifier_of(hashlib.sha1(IMAGE).hexdigest())


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return hashlib.new(algorithm, data).hexdigest()


def digests(data: bytes) -> dict[str, str]:
    return {algorithm: digest(data, algorithm) for algorithm in ("sha1", "sha256", "sha512")}


def fetched(location: str, kept: bytes = IMAGE, stored: bytes | None = None) -> Fetched:
    sent = kept if stored is None else stored
    return Fetched(location, digests(sent), digests(kept), len(sent), len(kept))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def jane(authority: Authority) -> Endorser:
    return authority.issue()


@pytest.fixture(scope="module")
def joe(authority: Authority) -> Endorser:
    return authority.issue("joe@example.org", name="Joe Tester")


@pytest.fixture
def trust(authority: Authority, tmp_path: Path) -> Trust:
    return Trust((authority.write(tmp_path / "ca.pem"),))


@pytest.fixture
def market() -> Iterator[Marketplace]:
    with marketplace() as started:
        started.publish("/images/disk.qcow2", IMAGE)
        yield started


@pytest.fixture
def sources(market: Marketplace, trust: Trust) -> Sources:
    return Sources((market.url,), trust)


@pytest.fixture
def resolver(sources: Sources) -> Resolver:
    return asking(sources)


def asking(sources: Sources) -> Resolver:
    return Resolver(Web(["127.0.0.1/32"]), sources)


def by(endorser: Endorser, image: bytes = IMAGE, *locations: str) -> bytes:
    return sign(entry(image, endorser=endorser.email, subject=endorser.subject, locations=locations), endorser)


def endorsers(resolution: Resolution) -> list[str | None]:
    return [found.endorser for found in resolution.entries]


# ---------------------------------------------------------------- identifiers


def test_an_identifier(market: Marketplace, resolver: Resolver, jane: Endorser, joe: Endorser) -> None:
    for document in (by(jane), by(joe), by(jane, OTHER)):
        market.add(document)
    found = resolver.resolve(IDENTIFIER)
    assert (found.reference, found.kind, found.location) == (IDENTIFIER, "identifier", None)
    assert endorsers(found) == ["jane.tester@example.org", "joe@example.org"]
    assert all(one.signed and one.identifier == IDENTIFIER for one in found.entries)
    assert market.url in found.entries[0].source


def test_an_identifier_nobody_knows(resolver: Resolver) -> None:
    with pytest.raises(NoEntry, match=IDENTIFIER):
        resolver.resolve(IDENTIFIER)


def test_what_a_marketplace_says_about_other_images_is_not_heard(
    market: Marketplace, sources: Sources, jane: Endorser
) -> None:
    """One that ignores the question, or lies."""
    market.publish("/metadata/", b"<metadata>" + by(jane, OTHER).partition(b"?>")[2] + b"</metadata>")
    with pytest.raises(NoEntry):
        asking(sources).resolve(IDENTIFIER)
    found = asking(sources).resolve(f"{market.url}/images/disk.qcow2")
    assert found.entries == ()


def test_several_marketplaces(market: Marketplace, sources: Sources, jane: Endorser, joe: Endorser) -> None:
    with marketplace() as second:
        market.add(by(jane))
        second.add(by(joe))
        both = replace(sources, marketplaces=(market.url, f"{second.url}/"))
        assert endorsers(asking(both).resolve(IDENTIFIER)) == ["jane.tester@example.org", "joe@example.org"]


def test_a_marketplace_that_is_down(market: Marketplace, sources: Sources, jane: Endorser) -> None:
    down = replace(sources, marketplaces=("http://127.0.0.1:1", market.url))
    with pytest.raises(Unreachable, match="127"):
        asking(down).resolve(IDENTIFIER)
    market.add(by(jane))
    assert endorsers(asking(down).resolve(IDENTIFIER)) == ["jane.tester@example.org"]


def test_a_marketplace_that_talks_nonsense(market: Marketplace, sources: Sources) -> None:
    market.publish("/metadata/", b"<html>hello</html>")
    with pytest.raises(BadMetadata):
        asking(sources).resolve(IDENTIFIER)


def test_an_entry_posted_by_a_client_is_found(market: Marketplace, resolver: Resolver, jane: Endorser) -> None:
    answer = requests.post(
        f"{market.url}/metadata/", by(jane), headers={"Content-Type": "application/rdf+xml"}, timeout=10
    )
    assert answer.status_code == 201
    assert endorsers(resolver.resolve(IDENTIFIER)) == ["jane.tester@example.org"]
    assert endorsers(resolver.resolve(answer.headers["Location"])) == ["jane.tester@example.org"]


# ---------------------------------------------------------------- URLs of metadata


def test_urls_of_a_marketplace(market: Marketplace, resolver: Resolver, jane: Endorser, joe: Endorser) -> None:
    own = market.add(by(jane))
    market.add(by(joe))
    for url, expected in {
        f"{market.url}/metadata/?id={IDENTIFIER}": 2,
        f"{market.url}/metadata?id={IDENTIFIER}&x=y": 2,
        f"{market.url}/metadata/{IDENTIFIER}": 2,
        f"{market.url}/metadata/{IDENTIFIER}/jane.tester@example.org": 1,
        own: 1,
    }.items():
        found = resolver.resolve(url)
        assert (found.reference, found.kind) == (url, "metadata")
        assert len(found.entries) == expected, url


def test_a_url_of_a_marketplace_without_such_an_entry(market: Marketplace, resolver: Resolver) -> None:
    with pytest.raises(NoEntry, match=IDENTIFIER):
        resolver.resolve(f"{market.url}/metadata/?id={IDENTIFIER}")


def test_a_marketplace_need_not_be_known(market: Marketplace, sources: Sources, jane: Endorser) -> None:
    own = market.add(by(jane))
    assert endorsers(asking(replace(sources, marketplaces=())).resolve(own)) == ["jane.tester@example.org"]


@pytest.mark.parametrize("content_type", ["application/rdf+xml", "text/plain", "application/octet-stream"])
def test_a_url_of_an_entry(market: Marketplace, resolver: Resolver, jane: Endorser, content_type: str) -> None:
    url = market.publish("/entries/x", by(jane), content_type)
    found = resolver.resolve(url)
    assert (found.kind, endorsers(found)) == ("metadata", ["jane.tester@example.org"])
    assert found.entries[0].source == url


def test_a_url_that_redirects_to_an_entry(market: Marketplace, resolver: Resolver, jane: Endorser) -> None:
    own = market.add(by(jane))
    short = market.redirect("/s/1", market.redirect("/s/2", own).removeprefix(market.url))
    found = resolver.resolve(short)
    assert (found.kind, endorsers(found)) == ("metadata", ["jane.tester@example.org"])


def test_an_entry_with_a_byte_order_mark_and_spaces(market: Marketplace, resolver: Resolver, jane: Endorser) -> None:
    url = market.publish("/x", b"\xef\xbb\xbf" + by(jane))
    assert resolver.resolve(url).kind == "metadata"


def test_an_entry_that_is_tampered_with(market: Marketplace, resolver: Resolver, jane: Endorser) -> None:
    url = market.publish("/x", by(jane).replace(b"qcow2", b"vmdk2"))
    with pytest.raises(BadSignature):
        resolver.resolve(url)


def test_a_document_about_two_images(market: Marketplace, resolver: Resolver, jane: Endorser) -> None:
    both = b"".join(document.partition(b"?>")[2] for document in (by(jane), by(jane, OTHER)))
    url = market.publish("/x", b"<metadata>" + both + b"</metadata>")
    with pytest.raises(BadReference, match="more than one image"):
        resolver.resolve(url)
    url = market.publish(f"/metadata/{IDENTIFIER}", b"<metadata>" + both + b"</metadata>")
    assert [found.identifier for found in resolver.resolve(url).entries] == [IDENTIFIER]


def test_an_empty_list(market: Marketplace, resolver: Resolver) -> None:
    with pytest.raises(NoEntry):
        resolver.resolve(market.publish("/x", b"<metadata/>"))


@pytest.mark.parametrize("page", [b"<html>hello</html>", b"<!DOCTYPE html><html></html>", b" <x"])
def test_a_page_is_neither_metadata_nor_an_image(market: Marketplace, resolver: Resolver, page: bytes) -> None:
    with pytest.raises(BadMetadata):
        resolver.resolve(market.publish("/x", page, "text/html"))


# ---------------------------------------------------------------- URLs of images


def test_an_image_known_by_its_location(market: Marketplace, resolver: Resolver, jane: Endorser) -> None:
    url = f"{market.url}/images/disk.qcow2"
    market.add(by(jane, IMAGE, "http://mirror.example.org/disk", url))
    market.add(by(jane, OTHER, "http://mirror.example.org/other"))
    found = resolver.resolve(url)
    assert (found.kind, found.location, endorsers(found)) == ("image", url, ["jane.tester@example.org"])
    assert found.entries[0].locations == (url, "http://mirror.example.org/disk")
    assert [path for path in market.asked if path.startswith("/metadata/?location=http")]


def test_only_the_beginning_of_an_image_is_looked_at() -> None:
    """Of a server with ranges so much is asked for; what one without sends is left unread."""

    def answer(state: Wire, peer: socket.socket, head: str) -> None:
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        state.pour(peer, bytes(1 << 16))

    with wire(answer) as server:
        assert asking(Sources(checksum_files=False)).resolve(server.url).kind == "image"
        assert server.idle.wait(10)
        assert server.sent < 64 << 20
    (head,) = server.requests
    assert "\r\nRange: bytes=0-511\r\n" in head


def test_an_image_nobody_speaks_of(market: Marketplace, resolver: Resolver) -> None:
    url = f"{market.url}/images/disk.qcow2"
    assert resolver.resolve(url) == Resolution(url, "image", (), url)


def test_an_empty_image(market: Marketplace, resolver: Resolver) -> None:
    assert resolver.resolve(market.publish("/images/empty", b"")).kind == "image"


def test_an_image_that_is_not_there(market: Marketplace, resolver: Resolver) -> None:
    with pytest.raises(Unreachable) as raised:
        resolver.resolve(f"{market.url}/images/none")
    assert raised.value.status == 404


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
def test_a_checksum_in_the_url(market: Marketplace, resolver: Resolver, algorithm: str) -> None:
    url = f"{market.url}/images/disk.qcow2"
    found = resolver.resolve(f"{url}?a=b%20c&{algorithm}={digest(IMAGE, algorithm).upper()}&d")
    assert found.location == f"{url}?a=b%20c&d"
    asked = Entry(source="the asker", checksums={algorithm: digest(IMAGE, algorithm)}, locations=(found.location,))
    assert found.entries == (asked,)
    assert not [path for path in market.asked if f"{algorithm}=" in path.partition("location")[0]]


@pytest.mark.parametrize("form", ["sha256:{}", "SHA-256:{}", "{}"])
def test_a_checksum_beside_the_url(market: Marketplace, resolver: Resolver, form: str) -> None:
    url = f"{market.url}/images/disk.qcow2"
    found = resolver.resolve(url, form.format(digest(IMAGE)))
    assert [(one.source, dict(one.checksums)) for one in found.entries] == [("the asker", {"sha256": digest(IMAGE)})]


def test_both_checksums(market: Marketplace, resolver: Resolver) -> None:
    url = f"{market.url}/images/disk.qcow2?sha256={digest(IMAGE)}"
    found = resolver.resolve(url, digest(IMAGE, "sha512"))
    assert dict(found.entries[0].checksums) == {"sha256": digest(IMAGE), "sha512": digest(IMAGE, "sha512")}
    assert resolver.resolve(url, digest(IMAGE)).entries
    with pytest.raises(BadReference, match="two different values of sha256"):
        resolver.resolve(url, digest(OTHER))


def test_a_checksum_and_an_endorser(market: Marketplace, resolver: Resolver, jane: Endorser, joe: Endorser) -> None:
    """Found by location, or by SHA-1; one that contradicts the asker is not about what is asked for."""
    url = f"{market.url}/images/disk.qcow2"
    market.add(by(jane))
    market.add(by(joe, OTHER, url))
    found = resolver.resolve(url, digest(IMAGE, "sha1"))
    assert endorsers(found) == ["jane.tester@example.org", None]
    assert found.entries[0].locations == (url,)
    assert endorsers(resolver.resolve(url)) == ["joe@example.org"]


def test_checksums_beside_the_image(market: Marketplace, sources: Sources) -> None:
    url = f"{market.url}/images/disk.qcow2"
    sums = market.publish("/images/SHA256SUMS", f"{digest(IMAGE)}  disk.qcow2\n".encode())
    (found,) = asking(sources).resolve(url).entries
    assert dict(found.checksums) == {"sha256": digest(IMAGE)}
    assert (found.source, found.locations, found.signed) == (f"{sums}, unsigned", (url,), False)
    assert asking(replace(sources, checksum_files=False)).resolve(url).entries == ()


def test_signed_checksums_beside_the_image(market: Marketplace, sources: Sources, tmp_path: Path) -> None:
    url = f"{market.url}/images/disk.qcow2"
    sums = f"{digest(IMAGE)}  disk.qcow2\n".encode()
    market.publish("/images/SHA256SUMS", sums)
    with gpg() as made:
        jane, joe = made.key("jane"), made.key("joe")
        keyring = made.export(tmp_path / "keyring.gpg", [jane, joe])
        strict = replace(sources, keyring=keyring, fingerprints=(jane,), require_signed_checksums=True)
        with pytest.raises(BadChecksumFile, match="not signed"):
            asking(strict).resolve(url)
        market.publish("/images/SHA256SUMS.gpg", made.detached(sums, jane))
        assert asking(strict).resolve(url).entries[0].source.endswith(f"signed by {jane}")
        with pytest.raises(BadChecksumFile, match="another key"):
            asking(replace(strict, fingerprints=(joe,))).resolve(url)


# ---------------------------------------------------------------- a checksum with other references


def test_an_identifier_and_a_checksum(market: Marketplace, resolver: Resolver, jane: Endorser) -> None:
    market.add(by(jane))
    assert endorsers(resolver.resolve(IDENTIFIER, digest(IMAGE))) == ["jane.tester@example.org"]
    with pytest.raises(NoEntry, match="checksum that was asked for"):
        resolver.resolve(IDENTIFIER, digest(OTHER))


def test_what_the_asker_says_does_not_replace_what_the_endorser_says(
    market: Marketplace, resolver: Resolver, jane: Endorser
) -> None:
    """A stronger checksum of the asker's is demanded besides, and does not become the one that decides."""
    market.add(sign(entry(IMAGE, algorithms=["sha256"]), jane))
    found = resolver.resolve(IDENTIFIER, digest(OTHER, "sha512"))
    assert found.entries[0].strongest == ("sha256", digest(IMAGE))
    with pytest.raises(WrongDigest, match="asked for"):
        resolver.by_digest(found, fetched("http://x/"))
    with pytest.raises(WrongDigest, match="entries"):
        resolver.by_digest(replace(found, checksums={}), fetched("http://x/", OTHER))


# ---------------------------------------------------------------- once the bytes are there


@pytest.fixture
def unknown(market: Marketplace, resolver: Resolver) -> Resolution:
    found = resolver.resolve(f"{market.url}/images/disk.qcow2")
    assert found.entries == ()
    return found


def test_by_the_digest_of_what_was_kept(
    market: Marketplace, resolver: Resolver, unknown: Resolution, jane: Endorser
) -> None:
    market.add(by(jane))
    (found,) = resolver.by_digest(unknown, fetched("http://x/", IMAGE, b"compressed")).entries
    assert (found.endorser, found.signed, found.locations) == ("jane.tester@example.org", True, ("http://x/",))
    assert found.checksums == digests(IMAGE)


def test_by_the_digest_of_what_was_sent(
    market: Marketplace, resolver: Resolver, unknown: Resolution, jane: Endorser
) -> None:
    market.add(by(jane, b"compressed"))
    (found,) = resolver.by_digest(unknown, fetched("http://x/", IMAGE, b"compressed")).entries
    assert found.identifier == identifier_of(digest(b"compressed", "sha1"))
    assert found.checksums == digests(b"compressed")


def test_a_sha1_alone_is_no_proof(market: Marketplace, resolver: Resolver, unknown: Resolution, jane: Endorser) -> None:
    """Two images with one SHA-1: what the entry says of its SHA-256 decides."""
    colliding = Fetched("http://x/", *(digests(OTHER) | {"sha1": digest(IMAGE, "sha1")},) * 2, 1, 1)
    market.add(by(jane))
    (found,) = resolver.by_digest(unknown, colliding).entries
    assert (found.source, found.signed, found.endorser) == ("nobody", False, None)
    assert found.identifier == IDENTIFIER  # so that lists of what is denied still know it


def test_an_entry_of_a_sha1_alone_says_so(
    market: Marketplace, resolver: Resolver, unknown: Resolution, jane: Endorser
) -> None:
    market.add(sign(entry(IMAGE, algorithms=["sha1"]), jane))
    assert resolver.resolve(IDENTIFIER).entries[0].strongest == ("sha1", digest(IMAGE, "sha1"))
    (found,) = resolver.by_digest(unknown, fetched("http://x/")).entries
    assert found.checksums == digests(IMAGE)


def test_what_is_denied_is_so_packed_in_another_way_too(
    market: Marketplace, resolver: Resolver, unknown: Resolution, jane: Endorser
) -> None:
    """Whoever endorses the packed bytes says nothing of what comes out."""
    market.add(by(jane, b"compressed"))
    came = fetched("http://x/", IMAGE, b"compressed")
    (found,) = resolver.by_digest(unknown, came).entries
    now = dt.datetime.now(dt.UTC)
    assert judge(Policy(), [found], now).passed
    for policy in (
        Policy(deny_checksums=frozenset([digest(IMAGE).upper()])),
        Policy(deny_images=frozenset([IDENTIFIER])),
        Policy(allow_checksums=frozenset([digest(IMAGE)])),
        Policy(allow_images=frozenset([IDENTIFIER])),
    ):
        assert judge(policy, [found], now).passed is None


def test_bytes_nobody_knows(resolver: Resolver, unknown: Resolution) -> None:
    (found,) = resolver.by_digest(unknown, fetched("http://x/")).entries
    assert found == Entry("nobody", IDENTIFIER, checksums=digests(IMAGE), locations=("http://x/",))


def test_known_entries_get_what_was_computed(market: Marketplace, resolver: Resolver) -> None:
    url = f"{market.url}/images/disk.qcow2"
    found = resolver.by_digest(resolver.resolve(url, digest(IMAGE)), fetched(url))
    assert [(one.source, one.identifier, one.checksums) for one in found.entries] == [
        ("the asker", IDENTIFIER, digests(IMAGE))
    ]
    with pytest.raises(WrongDigest):
        resolver.by_digest(resolver.resolve(url, digest(OTHER)), fetched(url))


def test_an_entry_that_lies_about_a_weaker_checksum(
    market: Marketplace, resolver: Resolver, trust: Trust, jane: Endorser
) -> None:
    """Its SHA-256 matches, its SHA-1 is that of an allowed image: refused, not let in under that name."""
    lying = replace(
        resolver.resolve(market.publish("/x", by(jane))).entries[0],
        checksums={"sha1": digest(OTHER, "sha1"), "sha256": digest(IMAGE)},
    )
    with pytest.raises(WrongDigest):
        resolver.by_digest(Resolution("x", "metadata", (lying,)), fetched("http://x/"))


# ---------------------------------------------------------------- what is no reference


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "x",
        IDENTIFIER[:-1],
        IDENTIFIER + "A",
        "disk.qcow2",
        "/etc/passwd",
        "file:/etc/passwd",
        "http:disk",
        "a" * 5000,
    ],
)
def test_what_is_no_reference(resolver: Resolver, reference: str) -> None:
    with pytest.raises(BadReference):
        resolver.resolve(reference)


@pytest.mark.parametrize(
    "reference", ["file:///etc/passwd", "ftp://example.org/disk", "http://0x7f.1/", "http://h/a b"]
)
def test_what_is_no_url_of_ours(resolver: Resolver, reference: str) -> None:
    with pytest.raises(BadUrl):
        resolver.resolve(reference)


def test_addresses_are_checked(sources: Sources, market: Marketplace) -> None:
    with pytest.raises(AddressRefused):
        Resolver(Web(), sources).resolve(f"{market.url}/images/disk.qcow2")
    with pytest.raises(AddressRefused):
        Resolver(Web(), sources).resolve(IDENTIFIER)
    assert market.asked == []


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:zz", f"md5:{'a' * 32}", f"sha256:{'a' * 40}", "a" * 32, "é" * 64]
)
def test_what_is_no_checksum(resolver: Resolver, text: str) -> None:
    with pytest.raises(BadReference):
        read_checksum(text)
    with pytest.raises(BadReference):
        resolver.resolve(IDENTIFIER, text)


def test_checksums_are_taken_off_urls() -> None:
    assert take_checksums("http://h/x") == ("http://h/x", {})
    assert take_checksums(f"http://u@h/x?sha256={'A' * 64}#f") == ("http://u@h/x", {"sha256": "a" * 64})
    assert take_checksums(f"http://h/x?a=%2F&SHA1={'1' * 40}&b=")[0] == "http://h/x?a=%2F&b="
    with pytest.raises(BadReference):
        take_checksums(f"http://h/x?sha256={'a' * 64}&sha256={'b' * 64}")


def test_cancelling(resolver: Resolver, market: Marketplace) -> None:
    class Cancelled(Exception):
        pass

    def check() -> None:
        raise Cancelled

    for reference in (IDENTIFIER, f"{market.url}/images/disk.qcow2"):
        with pytest.raises(Cancelled):
            resolver.resolve(reference, check=check)


@pytest.mark.parametrize("path", ["/none", "/images/disk.qcow2", "/x"])
def test_secrets_are_told_nobody(resolver: Resolver, market: Marketplace, jane: Endorser, path: str) -> None:
    market.publish("/x", by(jane))
    host = market.url.removeprefix("http://")
    told = ""
    for url in (f"http://user:s3cret@{host}{path}", f"{market.url}{path}?token=s3cret"):
        try:
            told += "".join(entry.source for entry in resolver.resolve(url, digest(IMAGE)).entries)
        except Unreachable as error:
            told += str(error)
    assert told
    assert "s3cret" not in told
    assert not [asked for asked in market.asked if asked.startswith("/metadata") and "s3cret" in asked]
