"""Every rule, by its name, in both directions; and the original's policy.cfg."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest

from imagecache.entries import Entry
from imagecache.policy import RULES, Judgement, Policy, judge, judge_location
from imagecache.policy_cfg import BadPolicyFile, read

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
DATA = Path(__file__).parent / "data"
GOOD = Entry(
    source="http://marketplace.example.org/metadata/X",
    identifier="BEE8-MMAw-Lk_IgsEExAy3d9R8h",
    size=1000,
    checksums={"sha1": "1" * 40, "sha256": "2" * 64},
    format="qcow2",
    locations=("http://one.example.org/image", "https://two.example.net/image"),
    endorser="jane.tester@example.org",
    subject="CN=Jane Tester,O=StratusLab",
    signed=True,
    created_at=NOW - dt.timedelta(10),
    valid_until=NOW + dt.timedelta(10),
)
UNSIGNED = replace(GOOD, signed=False, subject=None)


def judged(policy: Policy, *entries: Entry) -> Judgement:
    return judge(policy, entries, NOW)


def rule(policy: Policy, entry: Entry) -> str | None:
    """The rule that refuses it, None if it passes."""
    judgement = judged(policy, entry)
    assert (judgement.passed is None) == bool(judgement.refused)
    return judgement.refused[0].rule if judgement.refused else None


def some(*values: str) -> frozenset[str]:
    return frozenset(values)


REFUSED = {
    "bad-entry": (Policy(), replace(GOOD, fault="the signature does not match")),
    "deprecated": (Policy(), replace(GOOD, deprecated="has a hole")),
    "expired": (Policy(), replace(GOOD, valid_until=NOW)),
    "not-signed": (Policy(require_signature=True), UNSIGNED),
    "endorser-denied": (Policy(deny_endorsers=some("Jane.Tester@example.org")), GOOD),
    "endorser-not-allowed": (Policy(allow_endorsers=some("joe@example.org")), GOOD),
    "image-denied": (Policy(deny_images=some("BEE8-MMAw-Lk_IgsEExAy3d9R8h")), GOOD),
    "image-not-allowed": (Policy(allow_images=some("A" * 27)), GOOD),
    "checksum-denied": (Policy(deny_checksums=some("1" * 40)), GOOD),
    "checksum-not-allowed": (Policy(allow_checksums=some("3" * 64)), GOOD),
    "no-checksum": (Policy(), replace(GOOD, checksums={})),
    "weak-checksum": (Policy(), replace(GOOD, checksums={"sha1": "1" * 40})),
    "too-large": (Policy(max_size=999), GOOD),
    "format-not-allowed": (Policy(), replace(GOOD, format="vmdk")),
    "no-location": (Policy(), replace(GOOD, locations=())),
    "host-denied": (Policy(deny_hosts=some("one.example.org", "two.example.net")), GOOD),
    "host-not-allowed": (Policy(allow_hosts=some("example.org")), GOOD),
}


@pytest.mark.parametrize("name", [name for name in RULES if name != "superseded"])
def test_each_rule_refuses(name: str) -> None:
    policy, entry = REFUSED[name]
    judgement = judged(policy, entry)
    assert judgement.passed is None
    assert [(refusal.entry, refusal.rule) for refusal in judgement.refused] == [(entry, name)]
    assert name in str(judgement)
    assert entry.source in str(judgement)


@pytest.mark.parametrize(
    ("policy", "entry"),
    [
        (Policy(), GOOD),
        (Policy(), UNSIGNED),
        (Policy(require_signature=True), GOOD),
        (Policy(allow_endorsers=some("JANE.tester@example.org")), GOOD),
        (Policy(allow_endorsers=some("CN=Jane Tester,O=StratusLab")), replace(GOOD, endorser=None)),
        (Policy(deny_endorsers=some("joe@example.org")), GOOD),
        (Policy(allow_images=some("BEE8-MMAw-Lk_IgsEExAy3d9R8h")), GOOD),
        (Policy(allow_checksums=some("1" * 40)), GOOD),
        (Policy(allow_checksums=some("2" * 64)), GOOD),
        (Policy(allow_checksums=some("A" * 40)), replace(GOOD, checksums={"sha1": "a" * 40, "sha256": "2" * 64})),
        (Policy(allow_sha1=True), replace(GOOD, checksums={"sha1": "1" * 40})),
        (Policy(max_size=1000), GOOD),
        (Policy(max_size=10), replace(GOOD, size=None)),
        (Policy(formats=some("vmdk")), replace(GOOD, format="vmdk")),
        (Policy(), replace(GOOD, format=None)),
        (Policy(), replace(GOOD, valid_until=None)),
        (Policy(allow_deprecated=True), replace(GOOD, deprecated="old")),
    ],
)
def test_what_passes(policy: Policy, entry: Entry) -> None:
    assert rule(policy, entry) is None
    assert judged(policy, entry).passed == entry


def test_a_claim_denies_but_does_not_allow() -> None:
    assert rule(Policy(deny_endorsers=some("jane.tester@example.org")), UNSIGNED) == "endorser-denied"
    assert rule(Policy(allow_endorsers=some("jane.tester@example.org")), UNSIGNED) == "endorser-not-allowed"


@pytest.mark.parametrize("what", ["endorsers", "images", "checksums"])
def test_deny_beats_allow(what: str) -> None:
    own = {"endorsers": "jane.tester@example.org", "images": str(GOOD.identifier), "checksums": "1" * 40}[what]
    both = Policy(**{f"allow_{what}": some(own), f"deny_{what}": some(own)})  # type: ignore[arg-type]
    assert rule(both, GOOD) == f"{what[:-1]}-denied"


@pytest.mark.parametrize("written", ["2001:db8:0:0::1", "2001:0DB8::0001", "[2001:db8::1]"])
def test_an_address_is_known_however_it_is_written(written: str) -> None:
    for one, other in (("[2001:db8::1]", written), (f"[{written.strip('[]')}]", "2001:db8::1")):
        entry = replace(GOOD, locations=(f"http://{one}/disk.img",))
        assert rule(Policy(deny_hosts=some(other)), entry) == "host-denied"


def test_deny_beats_allow_of_hosts_too() -> None:
    policy = Policy(allow_hosts=some("one.example.org"), deny_hosts=some("one.example.org"))
    assert rule(policy, GOOD) == "host-denied"


def test_only_allowed_locations_are_left() -> None:
    denied = judged(Policy(deny_hosts=some("ONE.example.org")), GOOD)
    assert denied.passed == replace(GOOD, locations=("https://two.example.net/image",))
    allowed = judged(Policy(allow_hosts=some(".example.org")), GOOD)
    assert allowed.passed == replace(GOOD, locations=("http://one.example.org/image",))


@pytest.mark.parametrize(
    "location",
    [
        "http://user@evil.example.org/",
        "http://EVIL.example.org./x",
        "https://evil.example.org:8443/",
        "http://a.evil.example.org",
    ],
)
def test_a_host_is_known_however_it_is_written(location: str) -> None:
    policy = Policy(deny_hosts=some("evil.example.org", ".evil.example.org"))
    assert rule(policy, replace(GOOD, locations=(location,))) == "host-denied"


def test_a_dot_in_front_means_below_and_nothing_else() -> None:
    policy = Policy(deny_hosts=some(".example.org"))
    assert rule(policy, replace(GOOD, locations=("http://myexample.org/",))) is None
    assert rule(policy, replace(GOOD, locations=("http://a.b.example.org/",))) == "host-denied"


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://one.example.org/x", "http://0x7f000001/", "nonsense"]
)
def test_what_is_no_url_of_ours_is_no_allowed_location(location: str) -> None:
    assert rule(Policy(), replace(GOOD, locations=(location,))) == "host-not-allowed"


def test_the_first_rule_is_told() -> None:
    entry = replace(UNSIGNED, checksums={}, locations=(), deprecated="old")
    assert rule(Policy(require_signature=True), entry) == "deprecated"
    assert rule(Policy(require_signature=True, allow_deprecated=True), entry) == "not-signed"
    assert rule(Policy(allow_deprecated=True), entry) == "no-checksum"


def test_the_signed_one_of_several_passes_and_others_tried_are_told() -> None:
    bad = replace(GOOD, endorser="joe@example.org", valid_until=NOW - dt.timedelta(1))
    judgement = judged(Policy(), UNSIGNED, bad, GOOD)
    assert judgement.passed == GOOD
    assert [(refusal.entry, refusal.rule) for refusal in judgement.refused] == [(bad, "expired")]


def test_all_are_told_when_none_passes() -> None:
    entries = (replace(GOOD, deprecated="old"), replace(UNSIGNED, endorser="joe@example.org"))
    judgement = judged(Policy(require_signature=True), *entries)
    assert judgement.passed is None
    assert [refusal.rule for refusal in judgement.refused] == ["deprecated", "not-signed"]
    assert "jane.tester@example.org" in str(judgement)
    assert "joe@example.org (unsigned)" in str(judgement)


def test_no_entry_passes_nobody() -> None:
    assert judged(Policy()) == Judgement(None, ())


# ---------------------------------------------------------------- entries of the same endorser

LATER = replace(GOOD, created_at=NOW - dt.timedelta(1), deprecated="has a hole")


def test_what_an_endorser_took_back_stays_back() -> None:
    judgement = judged(Policy(), GOOD, LATER)
    assert judgement.passed is None
    assert [refusal.rule for refusal in judgement.refused] == ["superseded", "deprecated"]


def test_the_newer_one_is_the_one() -> None:
    newer = replace(LATER, deprecated=None)
    assert judged(Policy(), GOOD, newer).passed == newer


def test_a_signed_entry_takes_back_an_unsigned_one() -> None:
    assert [refusal.rule for refusal in judged(Policy(), UNSIGNED, LATER).refused] == ["deprecated", "superseded"]


@pytest.mark.parametrize(
    "other",
    [
        replace(LATER, signed=False, subject=None),
        replace(LATER, endorser="joe@example.org"),
        replace(LATER, identifier="A" * 27),
        replace(LATER, fault="the signature does not match"),
        replace(LATER, created_at=None),
        replace(LATER, created_at=GOOD.created_at),
    ],
)
def test_nobody_else_takes_it_back(other: Entry) -> None:
    assert judged(Policy(), GOOD, other).passed == GOOD


# ---------------------------------------------------------------- before anything is known


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy(), None),
        (Policy(deny_hosts=some("evil.example.org")), None),
        (Policy(deny_hosts=some("one.example.org")), "host-denied"),
        (Policy(allow_hosts=some("two.example.org")), "host-not-allowed"),
        (Policy(require_signature=True), "not-signed"),
        (Policy(allow_endorsers=some("jane.tester@example.org")), "not-signed"),
    ],
)
def test_a_location_nobody_speaks_of(policy: Policy, expected: str | None) -> None:
    refusal = judge_location(policy, "http://one.example.org/image")
    assert (refusal.rule if refusal else None) == expected


# ---------------------------------------------------------------- policy.cfg

AS_WRITTEN = Policy(
    allow_endorsers=some("jane.tester@example.org", "Joe.Tester@example.org"),
    deny_endorsers=some("hackers@example.org"),
    deny_images=some("GOaxJFdoEXvqAm9ArJgnZ0_ky6F"),
    deny_checksums=some("639ac4915da045efa809bd02b2609d9d3f932e85", "1104f3e30c030f8b93f220b04131032dddf51f21"),
)


def test_lists_under_keys() -> None:
    policy = read(DATA / "policy-keys.cfg")
    denied = frozenset(digest.lower() for digest in policy.deny_checksums)
    assert replace(policy, deny_checksums=denied) == replace(AS_WRITTEN, require_signature=False)
    assert (
        rule(policy, replace(GOOD, checksums={"sha1": "639ac4915da045efa809bd02b2609d9d3f932e85"})) == "checksum-denied"
    )


def test_lists_as_sections() -> None:
    assert read(DATA / "policy-sections.cfg") == replace(AS_WRITTEN, require_signature=True)


def test_short_keys_and_silence(tmp_path: Path) -> None:
    path = tmp_path / "policy.cfg"
    path.write_text("[endorsers]\nwhiteendorsers = a@example.org, b@example.org\nblackendorsers =\n  c@example.org\n")
    assert read(path) == Policy(
        allow_endorsers=some("a@example.org", "b@example.org"),
        deny_endorsers=some("c@example.org"),
        require_signature=True,
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[endorsers]\nwhitelistendorser = a@example.org\n", r"\[endorsers\] whitelistendorser:"),
        ("[endorsers]\nwhitelistimages = x\n", r"\[endorsers\] whitelistimages:"),
        ("[hosts]\nwhitelisthosts = x\n", r"\[hosts\]"),
        ("[validatemetadatafile]\nactivate = perhaps\n", r"\[validatemetadatafile\] activate: 'perhaps'"),
        ("[validatemetadatafile]\nactive = no\n", r"\[validatemetadatafile\] active:"),
        ("[endorsers]\nwhitelistendorsers = a\nwhitelistendorsers = b\n", "whitelistendorsers"),
        ("whitelistendorsers = a\n", "section"),
        ("[DEFAULT]\nactivate = no\n[validatemetadatafile]\n", r"\[DEFAULT\]"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "policy.cfg"
    path.write_text(text)
    with pytest.raises(BadPolicyFile, match=named) as raised:
        read(path)
    assert "policy.cfg" in str(raised.value)
