"""Facts come back exactly, and what cannot is refused by its key."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields, replace
from enum import IntEnum

import numpy as np
import pytest
import torch

from shoal.checkpoint.facts import Meta, decode, encode
from shoal.errors import DamagedError, SaveError

VALUES = [
    None, True, False, 0, -1, 2**80, "", "ü\n\ud800", 0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3,
    math.inf, -math.inf, [], [1, [2.5]], (), (0.9, 0.999), ((),), {}, {"a": {"b": (1, [None])}}, {"": 1},
    Counter({30: 1, 80: 2}),
]  # fmt: skip


def through(value: object) -> object:
    return decode(json.loads(json.dumps(encode(value, "x"), allow_nan=False)))


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_with_their_types(value: object) -> None:
    back = through(value)
    assert back == value
    assert repr(back) == repr(value)


def test_every_float_comes_back_bit_for_bit() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (2000, 8), dtype=np.uint8)
    floats = [x for x in raw.view(np.float64).reshape(-1).tolist() if not math.isnan(x)]
    assert through(floats) == floats
    assert math.isnan(through(math.nan))


def test_numpy_numbers_that_are_floats_come_back_as_floats() -> None:
    assert type(through(np.float64(0.1))) is float
    assert through(np.float64(0.1)) == 0.1


class Level(IntEnum):
    HIGH = 1


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.zeros(2), "x is a torch.Tensor"),
        ({"a": [1, {"lr": torch.tensor(1.0)}]}, "x.a[1].lr is a torch.Tensor"),
        pytest.param(object(), "x is a builtins.object", id="an object"),
        ((1, b"raw"), "x[1] is a builtins.bytes"),
        ({1, 2}, "x is a builtins.set"),
        (Level.HIGH, "Level, which"),
        (np.float32(1), "x is a numpy.float32"),
        ({1: 2}, "x has the key 1,"),
        ({"a": {"$float": "inf"}}, "x.a has the key '$float',"),
        (Counter({"a": 1, 2: 1}), "x has the key 2,"),
    ],
    ids=repr,
)
def test_what_json_cannot_hold_is_refused_by_its_key(value: object, told: str) -> None:
    with pytest.raises(SaveError) as caught:
        encode(value, "x")
    assert told in caught.value.what
    assert "which a manifest cannot hold exactly" in caught.value.what
    assert caught.value.remedy


META = Meta(
    strategy={"shard": "parameters", "ranks_per_copy": None},
    leaves=12,
    seed=2**63,
    world=3,
    epoch=2,
    position={"step": 5, "rest": [1, 2]},
    groups=({"lr": 1e-3, "betas": (0.9, 0.999), "params": ["w", "b"], "foreach": None},),
    schedulers=({"milestones": Counter({30: 1}), "best": math.inf, "_last_lr": [1e-3]},),
    versions={"torch": "2.13", "shoal": "0.1"},
    aliases={"head.weight": "wte.weight"},
    extra={"loss": 2.5},
)


def test_meta_comes_back() -> None:
    assert Meta.decode(json.loads(json.dumps(META.encode()))) == META
    plain = Meta(strategy={}, leaves=1, seed=0, world=1)
    assert Meta.decode(plain.encode()) == plain


def test_meta_names_the_field_that_cannot_be_saved() -> None:
    with pytest.raises(SaveError, match=r"groups\[0\]\.lr is a torch\.Tensor"):
        replace(META, groups=[{"lr": torch.tensor(0.1)}]).encode()


@pytest.mark.parametrize("name", [f.name for f in fields(Meta)])
def test_meta_that_lacks_a_field_is_damaged(name: str) -> None:
    record = META.encode()
    del record[name]
    with pytest.raises(DamagedError, match=f"the manifest's {name} is None where"):
        Meta.decode(record)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("leaves", True, "leaves is True where int belongs"),
        ("groups", {}, "groups is {} where list belongs"),
        ("groups", [1], "groups holds something that is no object"),
        ("versions", {"torch": 2}, "torch is 2 where str belongs"),
        ("extra", {"$pickle": ""}, r"a value it cannot have: \{'\$pickle': ''\}"),
        ("extra", {"a": {"$float": "1e5"}}, "a value it cannot have"),
        ("extra", {"a": {"$counter": [["a", 1]]}}, r"counts \['a', 1\]"),
    ],
)
def test_meta_that_cannot_be_is_damaged(field: str, value: object, told: str) -> None:
    with pytest.raises(DamagedError, match=told):
        Meta.decode({**META.encode(), field: value})
