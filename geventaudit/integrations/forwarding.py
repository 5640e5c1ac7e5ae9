"""Where a request came from, by the word of proxies, as far as they are trusted.

A proxy adds to a forwarding header the address that spoke to it, on the right. Everything left of what a trusted proxy
added may be anybody's invention, so a header is read from the right, and only while those who wrote it are trusted.
"""

from __future__ import annotations

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
_MAX_ADDRESS = 64  # characters of an IPv6 address and the name of an interface


class TrustedProxies:
    """The proxies whose word is taken.

    :param proxies: addresses and networks.
    :raises ValueError, TypeError: for what is neither.
    """

    def __init__(self, proxies: Iterable[str | Address | Network]) -> None:
        self._networks = [_network(each) for each in proxies]

    def trust(self, peer: Address | None) -> bool:
        """Whether *peer* is one of them."""
        return peer is not None and any(peer in network for network in self._networks)

    def caller(self, peer: Address | None, environ: Mapping[str, Any]) -> tuple[str, dict[str, str] | None]:
        """The address that the trusted *peer* forwarded the request for, and None; its own where it does not say.

        ``X-Forwarded-For`` and ``Forwarded`` may both be there, one from the proxy and one from the client, and nobody
        can tell which is which. When they say different things it is the peer's own address, and what each said.
        """
        told: dict[str, str] = {}
        for name, key in _HEADERS:
            if header := environ.get(key):
                hops = [_for_of(hop) for hop in _hops(header)] if name == "Forwarded" else _hops(header)
                if hops and hops[0] is not None:
                    told[name] = str(self._last_known(peer, hops))
        callers = set(told.values())
        if len(callers) == 1:
            return callers.pop(), None
        return str(peer), told or None

    def _last_known(self, peer: Address | None, hops: Sequence[str | None]) -> Address | None:
        """Follow *hops* from the trusted *peer*, nearest first, until one is not trusted, or names no address."""
        caller = peer
        for hop in hops:
            teller = _node(hop or "")
            if teller is None or teller.is_unspecified or teller.is_multicast:
                break
            if not teller.is_loopback:  # a proxy's own host is where that proxy is, not where this one is
                caller = teller
            if not self.trust(teller):
                break
        return caller


def address_of(text: str) -> Address | None:
    """The address that *text* is, or None; of an IPv4 address in an IPv6 one, the IPv4 address."""
    return _parsed(text) if len(text) <= _MAX_ADDRESS else None  # nothing long is remembered


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _network(value: object) -> Network:
    problem = f"trusted_proxies must be addresses and networks like '10.0.0.1' and '10.0.0.0/8', got {value!r}"
    if not isinstance(value, str | Address | Network):
        raise TypeError(problem)
    try:
        network = ip_network(value)
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)  # as logs have them; peers are compared as IPv4
    return IPv4Network((mapped, network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network


def _hops(header: str) -> list[str]:
    """What stands between the commas of a forwarding header, nearest first."""
    return [hop for hop in reversed(header.rsplit(",", _HOPS)[-_HOPS:]) if hop.strip()]


def _for_of(element: str) -> str | None:
    """The ``for`` of one element of a ``Forwarded`` header; None where it has none, empty where it is broken.

    Proxies quote there what clients sent (``host="..."``). A quoted comma or semicolon has split that text, a quoted
    quote may end it: then what stands in it looks like the proxy's own word. So one bad pair spoils the element.
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


def _node(text: str) -> Address | None:
    """An address, with or without brackets and port; None for ``unknown``, made-up names and nonsense."""
    text = text.strip()
    if "%" in text:  # a zone means nothing on another host, and is any text at all
        return None
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return address_of(text)
