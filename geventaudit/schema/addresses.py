"""The spelling of IP addresses and service tree ids on the wire."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import cast
from uuid import UUID

from ..errors import ValidationError, show

__all__ = ["canonical_address", "service_tree_uuid"]

_OCTETS = frozenset(map(str, range(256)))
# All unspecified, loopback and multicast addresses begin with one of these.
_SPECIAL_FIRST_OCTETS = frozenset(map(str, (0, 127, *range(224, 240))))


def canonical_address(text: str) -> tuple[str, str | None]:
    """Return the spelling of an address on the wire, and the reason that forbids it as a caller's address, or None.

    :raises ValueError: *text* is not an IP address.
    """
    octets = text.split(".", 4)
    if len(octets) == 4 and octets[0] not in _SPECIAL_FIRST_OCTETS and _OCTETS.issuperset(octets):
        return text, None  # the common case, in a tenth of the time
    if len(text) > 64:  # not cached: callers choose their addresses, and a zone can have any length
        return _canonical_address.__wrapped__(text)
    return _canonical_address(text)


@lru_cache(maxsize=4096)
def _canonical_address(text: str) -> tuple[str, str | None]:
    bare, percent, zone = text.partition("%")
    address = ip_address(bare)
    if percent and (not zone or isinstance(address, IPv4Address)):
        raise ValueError(f"{show(text)} has an empty zone, or a zone without being IPv6")
    plain: IPv4Address | IPv6Address = address
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        # str() of a mapped address is hexadecimal before Python 3.13; the wire has it dotted.
        plain = address.ipv4_mapped
        bare = f"::ffff:{plain}"
    else:
        bare = str(address)
    problem = None
    for kind in ("unspecified", "loopback", "multicast"):
        if getattr(plain, f"is_{kind}"):
            hint = "" if kind == "multicast" else " (fill_unknown(record) replaces it)"
            problem = f"must not be {'an' if kind[0] == 'u' else 'a'} {kind} address{hint}, got {show(text)}"
    return bare + percent + zone, problem


def service_tree_uuid(value: object) -> str:
    """Return a service tree id in its canonical spelling.

    :raises ValidationError: *value* is not a UUID, or is the nil UUID.
    """
    try:
        uuid = value if isinstance(value, UUID) else UUID(cast(str, value))
    except (ValueError, TypeError, AttributeError):
        uuid = UUID(int=0)
    if uuid.int == 0:
        problem = f"the service tree id must be a UUID and not the nil UUID, got {show(value)}"
        raise ValidationError({"env_ikey": [problem]})
    return str(uuid)
