"""Which URLs are read, and which addresses are connected to: a reference must not make us speak to our own network."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from .errors import BadUrl

PORTS = {"http": 80, "https": 443}

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
#: A host that ends in a number is an address, or none: https://url.spec.whatwg.org/#ends-in-a-number-checker
_NUMBER = re.compile(r"(?:^|\.)(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?$")
_NOT_PUBLIC = (
    # is_global of Python 3.11 says yes to these: the protocols' own (RFC 6890; a cloud answers its guests' questions
    # there), relays to IPv4 (RFC 7526, 3056), documentation (RFC 9637). And to the address of another cloud's host,
    # which only its guests reach: https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("168.63.129.16/32"),
    ipaddress.ip_network("192.88.99.0/24"),
    ipaddress.ip_network("2002::/16"),
    ipaddress.ip_network("3fff::/20"),
)
#: All of the public IPv6 Internet. What lies outside is local, or IPv4 in disguise (mapped, NAT64, compatible).
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Url:
    """A URL in parts. `host` is in lower case, an IPv6 address without brackets and in its one short form, so that
    lists of hosts can be compared with it; `target` is the path and query that a server is asked for; `userinfo` is as
    in the URL, None when there is none."""

    scheme: str
    host: str
    port: int
    target: str
    userinfo: str | None

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def parse(url: str) -> Url:
    """The parts of an http or https URL. A host is a name, or an address written as everybody writes it: no decimal,
    octal, hexadecimal or short forms, which resolvers understand and lists do not. Raises BadUrl."""
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise BadUrl(f"{shown(url)}: a URL is written in printable ASCII, without spaces or backslashes")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise BadUrl(f"{shown(url)}: not a URL") from None
    if parts.scheme not in PORTS:
        raise BadUrl(f"{shown(url)}: only http and https are read")
    if not _is_host(host) or port == 0:
        raise BadUrl(f"{shown(url)}: its host or port is none")
    userinfo = parts.netloc.rpartition("@")[0] or None
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    address = address_of(host)
    return Url(parts.scheme, host if address is None else str(address), port or PORTS[parts.scheme], target, userinfo)


def _is_host(host: str) -> bool:
    if ":" in host or _NUMBER.search(host):
        return address_of(host) is not None
    return _NAME.fullmatch(host) is not None


def address_of(host: str) -> Address | None:
    """The address that a host is, None if it is a name. Zones (`%eth0`) are of this machine, so none of ours."""
    try:
        return None if "%" in host else ipaddress.ip_address(host)
    except ValueError:
        return None


def shown(url: str) -> str:
    """A URL for messages: without userinfo, query and fragment, which hold passwords and tokens."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "a URL that cannot be read"
    host = f"[{host}]" if ":" in host else host
    text = f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path}"
    return re.sub(r"[^!-~]", "?", text)[:300]


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks from CIDRs. Raises ValueError."""
    return tuple(ipaddress.ip_network(text) for text in texts)


def is_allowed(address: Address, allowed: Sequence[Network]) -> bool:
    """Whether one may connect there: a public unicast address, or one in `allowed`."""
    if any(address in network for network in allowed):
        return True
    if address.version == 6 and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)
