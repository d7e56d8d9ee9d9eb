"""Network interfaces and their addresses."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from shoal.doctor.facts import Interface
from shoal.doctor.system import ROOT, number, text

_SIOCGIFCONF = 0x8912  # all interfaces with their IPv4 addresses: netdevice(7)
_REQUEST = 40 if struct.calcsize("P") == 8 else 32  # bytes of a `struct ifreq`
_CONF = "iP"
_ROOM = 256


def interfaces(root: Path = ROOT) -> tuple[Interface, ...]:
    """All interfaces, by name."""
    addresses: dict[str, list[str]] = {}
    for name, address in (*_version4(), *_version6(root)):
        addresses.setdefault(name, []).append(address)
    names = {path.name for path in (root / "sys/class/net").glob("*") if path.is_dir()}
    return tuple(_interface(root / "sys/class/net" / name, addresses.get(name, [])) for name in sorted(names))


def _interface(path: Path, addresses: list[str]) -> Interface:
    speed = number(text(path / "speed"))
    flags = text(path / "flags")
    return Interface(
        name=path.name,
        up=bool(int(flags, 16) & 1) if flags else False,  # IFF_UP: `operstate` is unknown for loopback
        speed=speed if speed is not None and speed > 0 else None,
        addresses=tuple(addresses),
    )


def _version4() -> Iterator[tuple[str, str]]:
    room = array.array("B", bytes(_REQUEST * _ROOM))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            reply = fcntl.ioctl(asked, _SIOCGIFCONF, struct.pack(_CONF, len(room), room.buffer_info()[0]))
        except OSError:
            return
    used: int = struct.unpack(_CONF, reply)[0]
    for at in range(0, used, _REQUEST):
        one = room[at : at + _REQUEST].tobytes()
        yield one[:16].split(b"\0")[0].decode().split(":")[0], socket.inet_ntoa(one[20:24])


def _version6(root: Path) -> Iterator[tuple[str, str]]:
    for line in text(root / "proc/net/if_inet6").splitlines():
        digits, *_, name = line.split()
        yield name, str(ipaddress.IPv6Address(bytes.fromhex(digits)))


def address_of(host: str) -> str:
    """What a host's name stands for here, IPv4 if there is one; "" if nothing."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    return str(found[0][4][0])
