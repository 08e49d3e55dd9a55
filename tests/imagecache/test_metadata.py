"""Entries, real ones and made ones; documents that are none, or that would cost too much to read."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from pathlib import Path

import pytest

from imagecache.entries import Entry
from imagecache.errors import BadMetadata, BadSignature
from imagecache.metadata import parse
from imagecache.signatures import Trust
from imagecache.xmltree import MAX_ATTRIBUTES, MAX_BYTES, MAX_DEPTH, MAX_ELEMENTS, MAX_NAMESPACES
from imagecache.xmltree import parse as parse_xml
from tests.support.endorsements import NOW, Authority, entry, sign

DATA = Path(__file__).parent / "data"
IMAGE = b"an image"
SHA1 = hashlib.sha1(IMAGE).hexdigest()
SHA256 = hashlib.sha256(IMAGE).hexdigest()


def read(document: bytes | str, trust: Trust | None = None) -> list[Entry]:
    return parse(document.encode() if isinstance(document, str) else document, "http://example.org/entry", trust)


def listed(*documents: bytes) -> bytes:
    """As the Marketplace lists several."""
    bare = (re.sub(rb"<\?xml[^>]*\?>", b"", document) for document in documents)
    return b'<?xml version="1.0"?><metadata>' + b"".join(bare) + b"</metadata>"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def trust(authority: Authority, tmp_path: Path) -> Trust:
    return Trust((authority.write(tmp_path / "ca.pem"),))


# ---------------------------------------------------------------- real ones


def sample(name: str) -> Entry:
    (found,) = parse((DATA / f"{name}.xml").read_bytes(), name, None)
    return found


def test_a_real_entry() -> None:
    assert sample("valid") == Entry(
        source="valid",
        identifier="BEE8-MMAw-Lk_IgsEExAy3d9R8h",
        size=128,
        checksums={
            "sha1": "1104f3e30c030f8b93f220b04131032dddf51f21",
            "sha256": "63694032b698d2f455b67311e0d4b821e3c4a8a08c679f3e6514d5e13b7255f8",
            "sha512": "70cd8ad17fab1abe7fae230ff70f682ed3af4892225b3100e6a07fc2471b657d"
            "ef80fce93afd02aa7f3e716bb8cab02b745d032cdc4895d5fd242a7ac8403693",
        },
        format="raw",
        created_at=dt.datetime(2011, 9, 9, 14, 12, 57, tzinfo=dt.UTC),
        valid_until=dt.datetime(2014, 3, 5, 14, 12, 57, tzinfo=dt.UTC),
        os="ttylinux",
        os_version="9.3",
        architecture="i686",
        version="1.0",
    )


def test_a_real_endorsement_without_trust_is_a_claim() -> None:
    found = sample("valid-indate-signature")
    assert (found.endorser, found.subject, found.issuer, found.signed) == ("jane.tester@example.org", None, None, False)
    assert found.created_at == dt.datetime(2014, 3, 8, 14, 10, 40, tzinfo=dt.UTC)
    assert found.deprecated is None


def test_other_real_entries() -> None:
    assert sample("valid-two-locations").locations == ("http://www.example.org/1234", "http://www.example2.org/5678")
    assert sample("valid-alternative").title == "Alternative"
    assert sample("valid-indate-deprecated-signature").deprecated == "This is a test of deprecation"
    assert sample("valid-expired-signature").valid_until == dt.datetime(2011, 9, 10, 11, 23, 2, tzinfo=dt.UTC)
    assert sample("invalid-special-characters-signature").identifier == "BEE8-MMAw-Lk_IgsEExAy3d9R8h"


@pytest.mark.parametrize("path", sorted(DATA.glob("*-signature.xml")), ids=lambda path: path.stem)
def test_real_signatures_of_a_ca_that_is_not_ours(path: Path, trust: Trust) -> None:
    with pytest.raises(BadSignature, match="was valid from 201"):
        parse(path.read_bytes(), path.stem, trust)


# ---------------------------------------------------------------- made ones


def test_what_an_entry_says() -> None:
    (found,) = read(entry(IMAGE, locations=["http://a.example/x?y=1&z=2", "http://b.example/"], compression="GZIP"))
    assert found.checksums == {"sha1": SHA1, "sha256": SHA256, "sha512": hashlib.sha512(IMAGE).hexdigest()}
    assert found.locations == ("http://a.example/x?y=1&z=2", "http://b.example/")
    assert (found.format, found.compression, found.size) == ("qcow2", "gz", len(IMAGE))
    assert (found.endorser, found.created_at) == ("jane.tester@example.org", NOW)
    assert found.source == "http://example.org/entry"


@pytest.mark.parametrize(
    ("told", "expected"),
    [("", None), ("none", None), ("gz", "gz"), ("bzip2", "bz2"), ("xz", "xz"), ("zstd", "zst"), ("7z", "7z")],
)
def test_compressions(told: str, expected: str | None) -> None:
    assert read(entry(IMAGE, compression=told))[0].compression == expected


def test_an_identifier_is_a_sha1() -> None:
    (found,) = read(entry(IMAGE, algorithms=["sha256"]))
    assert found.checksums == {"sha1": SHA1, "sha256": SHA256}
    without = re.sub(rb"<dcterms:identifier>.*?</dcterms:identifier>", b"", entry(IMAGE))
    assert read(without)[0].identifier == found.identifier


def test_deprecated_without_a_reason_is_deprecated() -> None:
    assert read(entry(IMAGE, deprecated=""))[0].deprecated == "no reason is given"
    assert read(entry(IMAGE))[0].deprecated is None


def test_comments_cut_nothing_short() -> None:
    document = entry(IMAGE).replace(b"jane.tester@example.org", b"jane.tester@example.org<!-- -->.evil.example")
    assert read(document)[0].endorser == "jane.tester@example.org.evil.example"


def test_text_of_other_elements_is_not_its_own() -> None:
    document = entry(IMAGE).replace(b"jane.tester@", b"<x>admin</x>jane.tester@")
    assert read(document)[0].endorser == "jane.tester@example.org"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"{SHA1}</slreq:value>", f"{'0' * 40}</slreq:value>"),
        (SHA256, SHA256[:-1]),
        (SHA256, SHA256[:-1] + "g"),
        ("<slreq:bytes>8<", "<slreq:bytes>-8<"),
        ("<slreq:bytes>8<", "<slreq:bytes>8e9<"),
        ("<slreq:bytes>8<", f"<slreq:bytes>{'9' * 30}<"),
        ("<dcterms:identifier>", "<dcterms:identifier>x"),
        ("<dcterms:valid>", "<dcterms:valid>soon"),
        ("<dcterms:valid>2", "<dcterms:valid>9999-99-99T00:00:00Z2"),
        ("<slterms:os>", "<slterms:os>Other</slterms:os><slterms:os>"),
        ("<dcterms:format>", "<dcterms:format>raw</dcterms:format><dcterms:format>"),
        ("<slreq:email>", "<slreq:email>other@example.org</slreq:email><slreq:email>"),
        ("<slreq:endorser ", '<slreq:endorser rdf:parseType="Resource"/><slreq:endorser '),
        ("rdf:Description", "rdf:Other"),
        ("rdf:RDF", "rdf:Other"),
    ],
)
def test_what_contradicts_itself_or_is_unreadable(old: str, new: str) -> None:
    document = entry(IMAGE).decode()
    assert old in document
    with pytest.raises(BadMetadata, match=r"http://example\.org/entry"):
        read(document.replace(old, new))


def test_two_values_of_one_checksum() -> None:
    more = (
        '<slreq:checksum rdf:parseType="Resource"><slreq:algorithm>SHA-256</slreq:algorithm>'
        f"<slreq:value>{'0' * 64}</slreq:value></slreq:checksum>"
    )
    with pytest.raises(BadMetadata, match="two values of sha256"):
        read(entry(IMAGE, more=more))


def test_checksums_nobody_verifies_with_are_passed_over() -> None:
    more = "<slreq:checksum><slreq:algorithm>MD5</slreq:algorithm><slreq:value>junk</slreq:value></slreq:checksum>"
    assert set(read(entry(IMAGE, more=more))[0].checksums) == {"sha1", "sha256", "sha512"}


def test_too_many_locations() -> None:
    with pytest.raises(BadMetadata, match="32 locations"):
        read(entry(IMAGE, locations=[f"http://example.org/{number}" for number in range(33)]))


# ---------------------------------------------------------------- several endorsers


def test_the_marketplaces_list(authority: Authority, trust: Trust) -> None:
    jane, joe = authority.issue(), authority.issue("joe@example.org", name="Joe Tester")
    document = listed(
        sign(entry(IMAGE), jane),
        entry(IMAGE, endorser="anna@example.org"),
        sign(entry(IMAGE, endorser=joe.email, subject=joe.subject), joe),
    )
    found = read(document, trust)
    assert [(one.endorser, one.signed, one.subject) for one in found] == [
        ("jane.tester@example.org", True, jane.subject),
        ("anna@example.org", False, None),
        ("joe@example.org", True, joe.subject),
    ]


def test_several_descriptions_in_one() -> None:
    one, two = entry(IMAGE), entry(b"another", endorser="joe@example.org")
    inner = re.search(rb"<rdf:Description.*</rdf:Description>", two, re.DOTALL)
    assert inner
    both = one.replace(b"</rdf:RDF>", inner[0] + b"</rdf:RDF>")
    assert [found.endorser for found in read(both)] == ["jane.tester@example.org", "joe@example.org"]


def test_one_bad_entry_does_not_take_the_others_away(authority: Authority, trust: Trust) -> None:
    good = sign(entry(IMAGE), authority.issue())
    tampered = good.replace(b">qcow2<", b">raw<")
    found = read(
        listed(tampered, entry(IMAGE, endorser="anna@example.org").replace(b"SHA-1<", b"SHA-256<"), good), trust
    )
    assert [one.fault is None for one in found] == [False, False, True]
    assert "does not match" in str(found[0].fault)
    assert (found[0].endorser, found[0].signed) == ("jane.tester@example.org", False)
    assert found[2].signed


def test_only_bad_entries(authority: Authority, trust: Trust) -> None:
    tampered = sign(entry(IMAGE), authority.issue()).replace(b">qcow2<", b">raw<")
    with pytest.raises(BadSignature, match="does not match"):
        read(listed(tampered, tampered), trust)


def test_an_empty_list() -> None:
    assert read("<metadata></metadata>") == []


@pytest.mark.parametrize(
    "document",
    [
        "",
        "hello",
        "<html><body>not found</body></html>",
        "<metadata><html/></metadata>",
        "<metadata xmlns='http://example.org/'/>",
        "<RDF/>",
        "<metadata>",
        "<metadata/><metadata/>",
        "<?xml version='1.0' encoding='UTF-16'?><metadata/>",
        "<?xml version='1.0' encoding='latin-1'?><metadata/>",
        "<?php system('id') ?><metadata/>",
        "<metadata>&undefined;</metadata>",
        "\x00",
    ],
)
def test_what_is_no_metadata(document: str) -> None:
    with pytest.raises(BadMetadata):
        read(document)


def test_other_encodings_are_not_guessed() -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-7"):
        with pytest.raises(BadMetadata):
            read("<metadata/>".encode(encoding) + "é".encode(encoding))
    with pytest.raises(BadMetadata):
        read("<metadata>é</metadata>".encode("latin-1"))
    assert read("\ufeff<metadata/>") == []


# ---------------------------------------------------------------- documents that cost


def entities(declarations: str, use: str) -> str:
    return f"<!DOCTYPE metadata [{declarations}]><metadata>{use}</metadata>"


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10 if n else "ha"}">' for n in range(10))


@pytest.mark.parametrize(
    "document",
    [
        entities(LAUGHS, "&l9;"),
        entities('<!ENTITY x SYSTEM "file:///etc/passwd">', "&x;"),
        entities('<!ENTITY x SYSTEM "http://127.0.0.1:1/">', "&x;"),
        entities('<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;', ""),
        entities(f'<!ENTITY x "{"x" * 100_000}">', "&x;" * 10_000),
        '<!DOCTYPE metadata SYSTEM "http://127.0.0.1:1/x.dtd"><metadata/>',
        "<!DOCTYPE metadata><metadata/>",
        '<?xml version="1.0"?>\n<!-- --><!DOCTYPE\nmetadata [<!ENTITY x "y">]><metadata/>',
    ],
)
def test_doctypes_and_entities(document: str) -> None:
    with pytest.raises(BadMetadata, match="DOCTYPE or entity"):
        read(document)


def test_a_doctype_in_another_encoding() -> None:
    with pytest.raises(BadMetadata):
        read(entities('<!ENTITY x SYSTEM "file:///etc/passwd">', "&x;").encode("utf-16"))


def test_xinclude_and_stylesheets_are_not_followed() -> None:
    include = '<xi:include xmlns:xi="http://www.w3.org/2001/XInclude" href="file:///etc/passwd" parse="text"/>'
    assert "root:" not in str(read(entry(IMAGE, more=include)))
    with pytest.raises(BadMetadata, match="processing instructions"):
        read('<?xml-stylesheet href="file:///etc/passwd"?><metadata/>')


def repeated(form: str, count: int) -> str:
    return " ".join(form.format(number) for number in range(count))


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (f"<metadata>{'x' * MAX_BYTES}</metadata>", "bytes"),
        (f"<metadata>{'<x/>' * MAX_ELEMENTS}</metadata>", "elements"),
        ("<x>" * (MAX_DEPTH + 1) + "</x>" * (MAX_DEPTH + 1), "levels"),
        ("<x>" * 100_000, "levels|depth"),
        ("<metadata " + repeated('a{}=""', MAX_ATTRIBUTES + 1) + "/>", "attributes"),
        ("<metadata " + repeated('a{}=""', 80_000) + "/>", "attributes"),
        ("<metadata " + repeated('xmlns:a{}="x"', MAX_NAMESPACES + 1) + "/>", "namespaces"),
        ("<metadata>" + repeated('<x xmlns:n{0}="urn:{0}">', 1000), "levels|depth|namespaces"),
        ("<metadata>" + repeated('<x xmlns:a{0}="1" xmlns:b{0}="2" xmlns:c{0}="3">', 12), "namespaces"),
    ],
)
def test_too_much(document: str, why: str) -> None:
    with pytest.raises(BadMetadata, match=why):
        read(document)


def test_as_much_as_is_read() -> None:
    assert len(parse_xml(b"<metadata>" + b"<x/>" * (MAX_ELEMENTS - 1) + b"</metadata>", "x")) == MAX_ELEMENTS - 1
    documents = [entry(IMAGE, endorser=f"user{number}@example.org") for number in range(100)]
    assert len(read(listed(*documents))) == 100
