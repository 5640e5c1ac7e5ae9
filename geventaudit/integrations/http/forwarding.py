"""The caller's address, by the forwarding headers of trusted proxies.

A proxy adds the address of its peer to a forwarding header, on the right. Everything left of the part that a trusted
proxy added may be a client's invention. So a header is read from the right, and only while its writers are trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

__all__ = ["Address", "Network", "TrustedProxies", "address_of"]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_HEADERS = (("X-Forwarded-For", "HTTP_X_FORWARDED_FOR"), ("Forwarded", "HTTP_FORWARDED"))
_HOPS = 32  # proxies in a row that are followed
_PAIRS = 16  # in one element of Forwarded; the standard has four
_MAX_NODE = 80  # characters of an IPv6 address and the name of an interface, with brackets, quotes and port
# A node of RFC 7239 (whose port may be a made-up name), the address of a socket, or a bare IPv6 address.
_NODE = re.compile(
    r"""\s*(?P<quote>"?)\s*
    (?:(?:\[(?P<bracketed>[\w:.%-]+)\]|(?P<v4>[0-9.]+))(?::(?:[0-9]{1,5}|_[\w.-]+))?|(?P<v6>[\w:.%-]+))
    \s*(?P=quote)\s*""",
    re.VERBOSE | re.ASCII,
)


class TrustedProxies:
    """The proxies whose headers are believed.

    :param proxies: addresses and networks.
    :raises ValueError, TypeError: one of them is neither.
    """

    def __init__(self, proxies: Iterable[str | Address | Network]) -> None:
        self._networks = [_network(each) for each in proxies]

    def trust(self, peer: Address | None) -> bool:
        """Return True if *peer* is one of them."""
        return peer is not None and any(peer in network for network in self._networks)

    def caller(self, peer: Address | None, environ: Mapping[str, Any]) -> tuple[str, dict[str, str] | None]:
        """Return the address for which the trusted *peer* forwarded the request, and None. Without headers, its own.

        ``X-Forwarded-For`` and ``Forwarded`` may both be there, one of the proxy and one of the client, and it is
        unknown which is which. If they contradict each other, return the peer's own address, and both by header.
        """
        found: dict[str, str] = {}
        for name, key in _HEADERS:
            if header := str(environ.get(key) or ""):
                hops = [_for_of(hop) for hop in _hops(header)] if name == "Forwarded" else _hops(header)
                if hops and hops[0] is not None:
                    found[name] = str(self._last_known(peer, hops))
        callers = set(found.values())
        if len(callers) == 1:
            return callers.pop(), None
        return str(peer), found or None

    def _last_known(self, peer: Address | None, hops: Sequence[str | None]) -> Address | None:
        """Follow *hops* from the trusted *peer*, nearest first, until one is not trusted, or names no address."""
        caller = peer
        for hop in hops:
            address = address_of(hop or "")
            if address is None or address.is_unspecified or address.is_multicast:
                break
            if not address.is_loopback:  # a proxy's own host is where that proxy is, not where this one is
                caller = address
            if not self.trust(address):
                break
        return caller


def address_of(text: str, *, zone: bool = False) -> Address | None:
    """Return the address in *text*, as servers and proxies write it; None if it is none.

    With or without quotes, brackets, port and space around it. Of an IPv4 address in an IPv6 one, the IPv4 address.

    :param zone: accept an IPv6 zone. On another host it means nothing, and may be any text.
    """
    if len(text) > _MAX_NODE or (not zone and "%" in text):
        return None
    return _parsed(text)  # nothing long is remembered


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Address | None:
    node = _NODE.fullmatch(text)
    if node is None:
        return None
    try:
        address = ip_address(node["bracketed"] or node["v4"] or node["v6"])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _network(value: object) -> Network:
    problem = f"trusted_proxies must be addresses and networks like '10.0.0.1' and '10.0.0.0/8', got {value!r}"
    if not isinstance(value, str | Address | Network):
        raise TypeError(problem)
    address = address_of(value) if isinstance(value, str) else None
    try:
        network = ip_network(value if address is None else address)
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)  # as logs have them; peers are compared as IPv4
    return IPv4Network((mapped, network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network


def _hops(header: str) -> list[str]:
    """Return the elements of a forwarding header, nearest first."""
    return [hop for hop in reversed(header.rsplit(",", _HOPS)[-_HOPS:]) if hop.strip()]


def _for_of(element: str) -> str | None:
    """Return the ``for`` of one element of a ``Forwarded`` header; None without one, empty in a broken element.

    Proxies quote texts of clients there (``host="..."``). A quoted comma or semicolon splits such a text, a quoted
    quote may end it. Its rest then looks like the proxy's own pairs. So one bad pair spoils the element.
    """
    if element.count(";") >= _PAIRS:
        return ""
    found = None
    for pair in filter(str.strip, element.split(";")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if not equals or '"' in name + value or "\\" in name + value:
            return ""
        if name.lower() == "for" and found is None:
            found = value
    return found
