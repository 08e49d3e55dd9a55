"""The policy.cfg of a StratusLab site, in both layouts that it had.

    [endorsers]                          [whitelistendorsers]
    whitelistendorsers =                 email1 = jane.tester@example.org
        jane.tester@example.org          [blacklistimages]
    blacklistendorsers =                 image1 = GOaxJFdoEXvqAm9ArJgnZ0_ky6F
    [images] …  [checksums] …            [validatemetadatafile]
                                         activate = True

Values are separated by newlines or commas. `activate` is whether metadata must be signed, as it must if nothing is
said. A value that is no identifier or digest is kept: it is equal to none.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .policy import Policy

_LISTS = {
    f"{prefix}{suffix}{what}": f"{'allow' if prefix == 'white' else 'deny'}_{what}"
    for prefix in ("white", "black")
    for suffix in ("list", "")
    for what in ("endorsers", "images", "checksums")
}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class BadPolicyFile(ValueError):
    """The file cannot be read as a policy; the message names the file, and the section and key."""


def read(path: Path) -> Policy:
    """Raises BadPolicyFile, OSError."""
    parser = configparser.ConfigParser(interpolation=None, strict=True, default_section="\0")
    try:
        parser.read_string(path.read_text(encoding="utf-8"), str(path))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise BadPolicyFile(f"{path}: {error}") from None
    lists: dict[str, set[str]] = {name: set() for name in _LISTS.values()}
    required = True
    for section, key, value in _items(parser, path):
        if section == "validatemetadatafile" and key == "activate":
            required = _boolean(value, f"{path}: [{section}] {key}")
        elif section in _LISTS or (key in _LISTS and key.endswith(section)):
            name = _LISTS[section if section in _LISTS else key]
            lists[name] |= set(filter(None, map(str.strip, re.split(r"[\n,]", value))))
        else:
            raise BadPolicyFile(f"{path}: [{section}] {key}: no key of a policy")
    read_lists: dict[str, Any] = {name: frozenset(values) for name, values in lists.items()}
    return Policy(require_signature=required, **read_lists)


def _items(parser: configparser.ConfigParser, path: Path) -> Iterator[tuple[str, str, str]]:
    known = {"endorsers", "images", "checksums", "validatemetadatafile", *_LISTS}
    for section in parser.sections():
        if section not in known:
            raise BadPolicyFile(f"{path}: [{section}]: no section of a policy")
        for key, value in parser.items(section):
            yield section, key, value


def _boolean(value: str, where: str) -> bool:
    if value.strip().lower() not in _BOOLEANS:
        raise BadPolicyFile(f"{where}: {value!r} is neither yes nor no")
    return _BOOLEANS[value.strip().lower()]
