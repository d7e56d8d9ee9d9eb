"""What a checkpoint says besides tensors, in JSON that gives back exactly what was put in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar, cast

from shoal.errors import DamagedError, SaveError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """The facts that a job needs besides tensors to continue with the same bits.

    Values are None, bool, int, float, str, and lists, tuples and string-keyed dicts of those. Floats come back bit for
    bit, infinities and nan included; tuples come back as tuples.

    Args:
        strategy: the strategy's fields.
        leaves: leaves of one step.
        seed: the job's seed.
        world: the number of ranks that saved.
        epoch: the data epoch.
        position: where in the data the job stands.
        groups: the optimizer's groups: settings and parameter names.
        schedulers: the state of each scheduler.
        versions: of torch and shoal.
        aliases: for tied parameters, the other names: alias -> name under which it is stored.
        extra: anything else.
    """

    strategy: Mapping[str, object]
    leaves: int
    seed: int
    world: int
    epoch: int = 0
    position: Mapping[str, object] = field(default_factory=dict[str, object])
    groups: Sequence[Mapping[str, object]] = ()
    schedulers: Sequence[Mapping[str, object]] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    extra: Mapping[str, object] = field(default_factory=dict[str, object])

    def encode(self) -> dict[str, object]:
        """For JSON.

        Raises:
            SaveError: a value that JSON cannot hold exactly, with the key that leads to it.
        """
        lists = {"groups": list(self.groups), "schedulers": list(self.schedulers)}
        return {f.name: encode(lists.get(f.name, getattr(self, f.name)), f.name) for f in fields(self)}

    @classmethod
    def decode(cls, record: Mapping[str, object]) -> Meta:
        """From JSON.

        Raises:
            DamagedError: a field is missing or has another type.
        """
        plain = {f.name: decode(record.get(f.name)) for f in fields(cls)}
        return cls(
            strategy=table(plain, "strategy"),
            leaves=take(plain, "leaves", int),
            seed=take(plain, "seed", int),
            world=take(plain, "world", int),
            epoch=take(plain, "epoch", int),
            position=table(plain, "position"),
            groups=tuple(dicts(plain, "groups")),
            schedulers=tuple(dicts(plain, "schedulers")),
            versions=_texts(plain, "versions"),
            aliases=_texts(plain, "aliases"),
            extra=table(plain, "extra"),
        )


def encode(value: object, where: str) -> object:
    """`value` as JSON that `decode` turns back into an equal value of the same types.

    Raises:
        SaveError: that cannot be; `where` names the key.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if type(value) is list:
        return _items(cast("list[object]", value), where)
    if type(value) is tuple:
        return {"$tuple": _items(cast("tuple[object, ...]", value), where)}
    if _is_counter(value):  # the milestones of torch's MultiStepLR
        return {"$counter": [list(pair) for pair in cast("Counter[int]", value).items()]}
    if isinstance(value, Mapping):
        return _dict(cast("Mapping[object, object]", value), where)
    raise SaveError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a manifest cannot hold exactly",
        remedy="numbers, text, None, and lists, tuples and dicts of those; tensors are saved as pieces",
    )


def _is_counter(value: object) -> bool:
    if type(value) is not Counter:
        return False
    return all(type(n) is int for pair in cast("Counter[object]", value).items() for n in pair)


def _items(values: Sequence[object], where: str) -> list[object]:
    return [encode(v, f"{where}[{i}]") for i, v in enumerate(values)]


def _dict(values: Mapping[object, object], where: str) -> dict[str, object]:
    coded: dict[str, object] = {}
    for key, value in values.items():
        if type(key) is not str or key.startswith("$"):
            raise SaveError(
                f"{where} has the key {key!r}, which a manifest cannot hold exactly",
                remedy="keys that are text and do not begin with $",
            )
        coded[key] = encode(value, f"{where}.{key}")
    return coded


def decode(value: object) -> object:
    """What was encoded.

    Raises:
        DamagedError: a mark that `encode` does not write.
    """
    if isinstance(value, list):
        return [decode(v) for v in cast("list[object]", value)]
    if not isinstance(value, dict):
        return value
    record = cast("dict[str, object]", value)
    mark = next(iter(record), "")
    if not mark.startswith("$"):
        return {k: decode(v) for k, v in record.items()}
    inner = record[mark]
    if mark == "$float" and isinstance(inner, str) and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if mark == "$tuple" and isinstance(inner, list):
        return tuple(decode(v) for v in cast("list[object]", inner))
    if mark == "$counter" and isinstance(inner, list):
        return _counter(cast("list[object]", inner))
    raise DamagedError(f"the manifest has a value it cannot have: {record}")


def _counter(pairs: list[object]) -> Counter[int]:
    counter: Counter[int] = Counter()
    for pair in pairs:
        match pair:
            case [int() as number, int() as count]:
                counter[number] = count
            case _:
                raise DamagedError(f"the manifest counts {pair!r}")
    return counter


def take(record: Mapping[str, object], key: str, sort: type[T]) -> T:
    """One field of a JSON object.

    Raises:
        DamagedError: it is missing or of another type.
    """
    value = record.get(key)
    if type(value) is not sort:
        raise DamagedError(f"the manifest's {key} is {value!r} where {sort.__name__} belongs")
    return value


def table(record: Mapping[str, object], key: str) -> dict[str, object]:
    """A field that is a JSON object.

    Raises:
        DamagedError: it is something else.
    """
    return cast("dict[str, object]", take(record, key, dict))


def _texts(record: Mapping[str, object], key: str) -> dict[str, str]:
    found = table(record, key)
    return {name: take(found, name, str) for name in found}


def dicts(record: Mapping[str, object], key: str) -> list[dict[str, object]]:
    """A field that is a list of JSON objects.

    Raises:
        DamagedError: it is something else.
    """
    items = cast("list[object]", take(record, key, list))
    if not all(isinstance(item, dict) for item in items):
        raise DamagedError(f"the manifest's {key} holds something that is no object")
    return cast("list[dict[str, object]]", items)


def whole_numbers(record: Mapping[str, object], key: str) -> tuple[int, ...]:
    """A field that is a list of numbers of at least 0.

    Raises:
        DamagedError: it is something else.
    """
    items = cast("list[object]", take(record, key, list))
    if not all(type(item) is int and item >= 0 for item in items):
        raise DamagedError(f"the manifest's {key} is {items!r} where whole numbers of at least 0 belong")
    return tuple(cast("list[int]", items))
