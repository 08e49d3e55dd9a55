"""The Marketplace's names of images: the SHA-1 of an image, written in 27 characters.

The digest is a big-endian integer in base 64, padded with two zero bits in front; base64.urlsafe_b64encode pads at the
end and gives another text. StratusLab's MetadataUtils.sha1ToIdentifier is the original.
"""

from __future__ import annotations

import re

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
LENGTH = 27

_VALUE = {letter: value for value, letter in enumerate(ALPHABET)}
# 160 bits: the first character holds only four of them.
_IDENTIFIER = re.compile(r"[A-P][A-Za-z0-9_-]{26}")
_SHA1 = re.compile(r"[0-9a-fA-F]{40}")


def is_identifier(text: str) -> bool:
    return _IDENTIFIER.fullmatch(text) is not None


def identifier_of(sha1: str) -> str:
    """The identifier of the image with this SHA-1 (hex). Raises ValueError."""
    if not _SHA1.fullmatch(sha1):
        raise ValueError(f"{sha1!r} is no SHA-1 in hex")
    number = int(sha1, 16)
    return "".join(ALPHABET[number >> shift & 63] for shift in range(6 * (LENGTH - 1), -1, -6))


def sha1_of(identifier: str) -> str:
    """The SHA-1 (hex, lower case) that an identifier is. Raises ValueError."""
    if not is_identifier(identifier):
        raise ValueError(f"{identifier!r} is no identifier of the Marketplace")
    number = 0
    for letter in identifier:
        number = number << 6 | _VALUE[letter]
    return f"{number:040x}"
