"""Which addresses callbacks may go to: public ones, and those that the setting ``callback_allow`` names.

A URL may come from anybody who can submit a job, and is fetched from where the workers are: without a policy it could
reach what only they can reach. What is judged is the address that its host leads to, never its text: ``2130706433``,
``0x7f.1`` and a name of somebody's own all lead to 127.0.0.1.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import urlsplit

#: The longest URL of a callback or a webhook, in characters.
MAX_URL: Final = 2048

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

#: What the words in ``callback_allow`` stand for. Link-local addresses are not among them: clouds keep secrets there.
WORDS: Final[dict[str, tuple[Network, ...]]] = {
    "loopback": (ip_network("127.0.0.0/8"), ip_network("::1")),
    "private": tuple(map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"))),
}

#: Where IPv6 addresses of hosts are. Outside are those that carry an IPv4 address in them (NAT64 and the like).
PUBLIC_IPV6: Final = ip_network("2000::/3")

#: What ``is_global`` calls public, depending on the version of Python, and is not the address of a host.
NOT_HOSTS: Final = tuple(
    map(
        ip_network,
        (
            "192.0.0.0/24",  # protocol assignments
            "192.88.99.0/24",  # relays of 6to4
            "2001::/23",  # protocol assignments, Teredo among them
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4: an IPv4 address, any, with a prefix
            "3fff::/20",  # documentation
        ),
    )
)

#: A name; its last part has a letter, else it would be an address of some spelling.
_NAME: Final = re.compile(r"([a-z0-9_-]+\.)*(?=[0-9_-]*[a-z])[a-z0-9_-]+")


def is_url(value: object) -> bool:
    """Whether it may be asked to be called. Where its host leads to is checked when it is."""
    if not isinstance(value, str) or len(value) > MAX_URL or not value.isprintable() or " " in value:
        return False
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc


class AddressRefused(Exception):
    """A callback may not go there; the text says what would allow it."""


@dataclass(frozen=True)
class AddressPolicy:
    """Which addresses may be called; made by `policy_of`."""

    networks: tuple[Network, ...] = ()
    #: Names, canonical, whose addresses are allowed whatever they are.
    hosts: frozenset[str] = frozenset()

    def check(self, host: str, addresses: Iterable[str]) -> None:
        """Raises `AddressRefused` if any of the addresses of a host, canonical, is not allowed: one that may be called
        beside one that may not is how a name is made to lead elsewhere."""
        for text in () if host in self.hosts else addresses:
            address = _inner(ip_address(text.partition("%")[0]))
            if not (_is_public(address) or any(address in network for network in self.networks)):
                raise AddressRefused(_refusal(host, address))


@functools.cache
def policy_of(allow: str | None, *, loopback: bool = False) -> AddressPolicy:
    """The policy that a text like ``10.1.2.0/24, hooks.example, loopback`` asks for; with `loopback` that too.

    Raises ValueError for an entry that is nothing of what is allowed.
    """
    networks, hosts = list(WORDS["loopback"] if loopback else ()), set()
    for entry in allow.split(",") if allow else ():
        text = entry.strip().lower()
        if text in WORDS:
            networks += WORDS[text]
        elif _NAME.fullmatch(name := _canonical_or_empty(text)):
            hosts.add(name)
        else:
            networks.append(_network(text))
    return AddressPolicy(tuple(networks), frozenset(hosts))


def canonical(host: str) -> str:
    """A host's name as it is compared, and as it is written on the wire. Raises UnicodeError for what can be none."""
    return host.removesuffix(".").encode("idna").decode("ascii").lower()


def _canonical_or_empty(host: str) -> str:
    try:
        return canonical(host)
    except UnicodeError:
        return ""


def _network(text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        around = ip_network(text, strict=False)
    except ValueError:
        allowed = "networks (10.1.2.0/24), addresses, names of hosts, loopback and private, parted by commas"
    else:
        allowed = f"the network {around} and the address {text.partition('/')[0]}"
    raise ValueError(f"not understood at {text!r}; allowed are {allowed}")


def _inner(address: Address) -> Address:
    """The IPv4 address that is called when an IPv6 address only wraps it."""
    return (address.version == 6 and address.ipv4_mapped) or address


def _is_public(address: Address) -> bool:
    if address.version == 6 and address not in PUBLIC_IPV6:
        return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or any(address in network for network in NOT_HOSTS)
    )


def _refusal(host: str, address: Address) -> str:
    words = [word for word, networks in WORDS.items() if any(address in network for network in networks)]
    names = [host] if _NAME.fullmatch(host) else []
    *others, last = [str(address), *words, *names]
    entries = f"{', '.join(others)} or {last}" if others else last
    where = f"{host} is {address}, which" if host != str(address) else host
    return (
        f"{where} is not a public address, and callbacks go to others only where MLQUEUE_CALLBACK_ALLOW of the workers "
        f"names them: add {entries} to it."
    )


__all__ = ["MAX_URL", "AddressPolicy", "AddressRefused", "canonical", "is_url", "policy_of"]
