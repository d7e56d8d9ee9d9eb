from __future__ import annotations

import os
import socket

import pytest
import torch

from shoal.comm.group import Group
from shoal.comm.lanes import SMALL, STRIPE, Lanes, asked_interfaces
from shoal.errors import EnvironmentFault
from shoal.start import find_carrier
from tests.comm.carriers import TIMEOUT
from tests.pool import Pool

SIZES = [1, SMALL, SMALL + 1, STRIPE - 1, STRIPE, STRIPE + 1]


def lanes(count: int) -> Lanes:
    return Lanes(["lo"] * count, "127.0.0.1", 1)


@pytest.mark.parametrize("interfaces", [1, 2, 3])
@pytest.mark.parametrize("nbytes", SIZES)
def test_parts_make_up_the_message(nbytes: int, interfaces: int) -> None:
    message = torch.arange(nbytes).to(torch.uint8)
    sent = list(lanes(interfaces).split("label", 0, message))
    assert torch.equal(torch.cat([part for _, part in sent]), message)
    assert len({tag for tag, _ in sent}) == len(sent)
    assert all(interfaces < tag < 2**31 for tag, _ in sent)  # none of `probes`
    over = [tag % (interfaces + 1) for tag, _ in sent]
    if nbytes <= SMALL:
        assert over == [0]
    elif nbytes < STRIPE:
        assert len(over) == 1
        assert over[0] > 0
    else:
        assert over == list(range(1, interfaces + 1))


def test_middling_messages_take_turns() -> None:
    both = lanes(2)
    over = [tag % 3 for n in range(100) for tag, _ in both.split("label", n, torch.zeros(SMALL))]
    assert 30 < over.count(1) < 70
    assert over.count(1) + over.count(2) == 100


def test_unknown_interfaces_are_named() -> None:
    known = ", ".join(name for _, name in socket.if_nameindex())
    with pytest.raises(EnvironmentFault) as caught:
        Lanes(["lo", "eth77"], "127.0.0.1", 1)
    assert str(caught.value) == (
        f"shoal[E50] there is no interface 'eth77' on this host\n  try:   interface= one of {known}"
    )


def test_who_is_asked_for_interfaces() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "eth0, eth1"}
    assert asked_interfaces(None, environ) == ("eth0", "eth1")
    assert asked_interfaces("lo,", environ) == ("lo",)
    assert asked_interfaces(None, {}) == ()


def exchange(interface: str) -> None:
    carrier, _ = find_carrier(TIMEOUT, "gloo", interface=interface)
    try:
        group = Group("world", range(carrier.size), carrier)
        for size in SIZES:
            flat = torch.zeros(3 * size, dtype=torch.uint8)
            flat[size * group.rank : size * (group.rank + 1)] = 1 + group.rank
            group.gather("gather", flat, [0, size, 2 * size, 3 * size]).wait()
            assert flat.tolist() == [1] * size + [2] * size + [3] * size
    finally:
        carrier.close()


@pytest.mark.parametrize("interface", ["lo", "lo,lo"])
def test_messages_arrive_over_all_of_them(interface: str, pool: Pool) -> None:
    pool.run(exchange, interface, world=3, timeout=20)


def unequal() -> None:
    find_carrier(TIMEOUT, "gloo", interface="lo,lo" if os.environ["RANK"] == "1" else "lo")


def test_unequal_numbers_of_interfaces_are_named(pool: Pool) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        pool.run(unequal)
    assert str(caught.value) == (
        "shoal[E50] rank 0 uses 1 network interfaces and rank 1 uses 2\n"
        "  cause: interface= or GLOO_SOCKET_IFNAME differs between hosts\n"
        "  try:   as many names on every host, in the order in which they are connected"
    )
