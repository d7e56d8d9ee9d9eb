"""Interfaces and addresses."""

from __future__ import annotations

from pathlib import Path

from shoal.doctor.network import address_of, interfaces
from tests.doctor.test_system import tree


def test_loopback_is_here() -> None:
    (lo,) = [found for found in interfaces() if found.name == "lo"]
    assert (lo.up, lo.speed) == (True, None)
    assert "127.0.0.1" in lo.addresses


def test_flags_speed_and_version_6(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "sys/class/net/x0/flags": "0x1003\n", "sys/class/net/x0/speed": "25000\n",
            "sys/class/net/x1/flags": "0x1002\n", "sys/class/net/x1/speed": "-1\n",
            "sys/class/net/bonding_masters": "x9\n",
            "proc/net/if_inet6": "fd000000000000000000000000000002 04 40 00 82       x0\n",
        },
    )  # fmt: skip
    shown = [(found.name, found.up, found.speed, found.addresses) for found in interfaces(root)]
    assert shown == [("x0", True, 25000, ("fd00::2",)), ("x1", False, None, ())]


def test_address_of() -> None:
    assert address_of("127.0.0.2") == "127.0.0.2"
    assert address_of("localhost") == "127.0.0.1"
    assert address_of("::1") == "::1"
    assert address_of("no-such-host.invalid") == ""
