"""Names on the wire: who may log in, what a volume is called, and the identity it keeps for life.

An iSCSI name has one of three forms (RFC 7143 §4.2.7) and at most 223 bytes:

    iqn.2026-11.org.example:anything      iqn. + year-month + reversed domain + optional text of the owner's choice
    eui.02004567A425678D                  eui. + 16 hex digits (IEEE EUI-64)
    naa.52004567BA64678D                  naa. + 16 or 32 hex digits (INCITS NAA)

RFC 3722 folds names to lower case and leaves only a-z, 0-9, "-", "." and ":" of ASCII. Letters outside ASCII are legal
there after normalisation; we refuse them, because no initiator we serve sends them and look-alikes are a risk.
"""

from __future__ import annotations

import re
from uuid import UUID

NAME_MAX = 223
LUN = 1  # of every volume in its target; LUN 0 is the target's own controller

_LABEL = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_IQN = re.compile(rf"iqn\.[0-9]{{4}}-(?:0[1-9]|1[0-2])\.{_LABEL}(?:\.{_LABEL})+(?::[a-z0-9.:-]+)?")
_EUI = re.compile(r"eui\.[0-9a-f]{16}")
_NAA = re.compile(r"naa\.(?:[0-9a-f]{32}|[0-9a-f]{16})")


class BadName(ValueError):
    """An iSCSI name that the RFC, or a target, would not take. `name` is what was given, `reason` what is wrong."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"{name[:NAME_MAX]!r} is not an iSCSI name: {reason}")


def validate_initiator(name: str) -> str:
    """`name` in its normal form (lower case), fit for an ACL. Raises BadName.

    Names compare without regard to case (RFC 7143 §4.2.7.1), yet targets compare bytes: an initiator that does not
    send the normal form, as RFC 3722 asks it to, is refused at login. That fails closed.
    """
    if not name.isascii() or not name.isprintable():
        raise BadName(name, "only printable ASCII is accepted")
    if len(name) > NAME_MAX:
        raise BadName(name, f"longer than {NAME_MAX} bytes")
    lowered = name.lower()
    form = {"iqn.": _IQN, "eui.": _EUI, "naa.": _NAA}.get(lowered[:4])
    if form is None:
        raise BadName(name, "it must begin with iqn., eui. or naa.")
    if not form.fullmatch(lowered):
        raise BadName(name, _WRONG[lowered[:4]])
    return lowered


_WRONG = {
    "iqn.": "expected iqn.YYYY-MM.reversed.domain[:text], the domain with a dot, the text of a-z 0-9 - . :",
    "eui.": "expected eui. and 16 hex digits",
    "naa.": "expected naa. and 16 or 32 hex digits",
}


def target_name(prefix: str, volume_id: UUID) -> str:
    """The IQN of a volume's target: the site's prefix, a colon, the volume's id. Raises BadName for a bad prefix."""
    return validate_initiator(f"{prefix}:{volume_id}")


def volume_of(prefix: str, iqn: str) -> UUID | None:
    """The volume whose target is called `iqn`, or None when the name is not one that `target_name(prefix, …)` makes."""
    head, _, tail = iqn.rpartition(":")
    try:
        volume_id = UUID(tail)
    except ValueError:
        return None
    return volume_id if head == prefix.lower() and str(volume_id) == tail else None


def naa(volume_id: UUID) -> str:
    """The volume's NAA designator (SPC-4 §7.8.6.6.5, "IEEE Registered Extended"): 32 hex digits that begin with 6.

    6, the OUI 001405, then the first 25 digits of the id. Linux' in-kernel target (LIO) derives the very same number
    from a unit serial that is `serial(volume_id)`: a volume keeps its identity whichever target serves it, and
    multipath never merges two volumes.
    """
    return "6001405" + volume_id.hex[:25]


def serial(volume_id: UUID) -> str:
    """The volume's unit serial number (VPD page 0x80): the 32 hex digits of its id."""
    return volume_id.hex
