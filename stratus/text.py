"""Text of other people on a terminal."""

from __future__ import annotations

import re
import unicodedata

# C0, DEL and C1 drive a terminal (ECMA-48); line separators forge lines; embeddings, overrides and isolates reorder
# what is read (CVE-2021-42574); lone surrogates cannot be printed. Marks such as ZWJ and RLM belong to names.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(match: re.Match[str]) -> str:
    """A matched character (of the basic plane) as a JSON escape (RFC 8259 §7)."""
    return f"\\u{ord(match[0]):04x}"


def clean(text: object) -> str:
    """`text` on one line, with every character that could drive a terminal or mislead a reader written as an escape."""
    return _HARMFUL.sub(escape, str(text))


def clean_json(text: str) -> str:
    """The same JSON value without such characters; the newlines of its layout stay."""
    return re.sub(r"[^\n\x20-\x7e]+", lambda run: _HARMFUL.sub(escape, run[0]), text)


def width(text: str) -> int:
    """The cells `text` takes on a terminal (Unicode UAX #11)."""
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
