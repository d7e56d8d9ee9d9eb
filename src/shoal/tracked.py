"""What a user adds to the checkpoint: `job.track(name=obj)`, and how its state becomes JSON and tensors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from shoal.checkpoint import Piece, Reader, Share
from shoal.checkpoint.tensors import raw_bytes
from shoal.errors import OrderError, SaveError, SettingError

KIND = "extra:tracked"
Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


@runtime_checkable
class Stateful(Protocol):
    """What can be tracked: schedulers, scalers, samplers, metrics, modules, the user's own."""

    def state_dict(self) -> Mapping[str, object]: ...
    def load_state_dict(self, state_dict: dict[str, object], /) -> object: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """The state of all that is tracked at one moment."""

    plain: Mapping[str, object]
    tensors: Sequence[tuple[str, Tensor]]

    def pieces(self, rank: int) -> Iterator[Piece]:
        """What this rank writes: rank 0 everything."""
        for name, tensor in self.tensors if rank == 0 else ():
            yield Piece.whole(KIND, name, tensor.detach())


class Tracked:
    """What a job's user has added to its checkpoints.

    Args:
        say: on rank 0.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.objects = say, dict[str, Stateful]()
        self._passed = set[str]()  # what a loaded checkpoint had, and nobody asked for

    def add(self, objects: Mapping[str, object]) -> None:
        """See `Job.track`."""
        for name, obj in objects.items():
            if not isinstance(obj, Stateful) or isinstance(obj, type):
                raise SettingError(
                    f"job.track({name}=...): a {type(obj).__name__} has no state_dict() and load_state_dict()",
                    remedy="give it both; an average of job.ema is saved without being tracked",
                )
            if self.objects.get(name, obj) is not obj:
                raise OrderError(f"job.track({name}=...) is taken by a {type(self.objects[name]).__name__}",
                                 remedy="another name")  # fmt: skip
            if name in self._passed:
                raise OrderError(
                    f"job.track({name}=...) came after job.load, which had a state for it", remedy="track, then load"
                )
            self.objects[name] = obj

    def take(self, share: Share) -> Taken:
        """The state now; rank 0's is what is saved. Collective.

        Raises:
            SaveError: something in it is neither a tensor nor JSON.
        """
        tensors: list[tuple[str, Tensor]] = []
        plain = {name: encode(obj.state_dict(), name, tensors) for name, obj in self.objects.items()}
        if plain:
            self._compare(plain, tensors, share)
        return Taken(plain=plain, tensors=tensors)

    def _compare(self, plain: Mapping[str, object], tensors: Sequence[tuple[str, Tensor]], share: Share) -> None:
        marks: dict[str, str] = {}
        for name in plain:
            digest = hashlib.sha256(json.dumps(plain[name]).encode())
            for key, tensor in tensors:
                if key.startswith(f"{name}/"):
                    digest.update(raw_bytes(tensor))
            marks[name] = digest.hexdigest()
        told = [cast("dict[str, str]", json.loads(data)) for data in share(json.dumps(marks).encode())]
        for name in marks:
            others = [rank for rank, theirs in enumerate(told) if theirs.get(name) != told[0].get(name)]
            if others:
                self.say(f"the state of '{name}' differs between rank 0 and rank {others[0]}: rank 0's is saved")

    def restore(self, saved: Mapping[str, object], reader: Reader) -> None:
        """Give every tracked object its state back. What either side lacks is said."""

        def tensor(name: str) -> Tensor:
            found = reader.extra(KIND, name)
            assert found is not None
            return found

        for name, obj in self.objects.items():
            if name in saved:
                obj.load_state_dict(cast("dict[str, object]", decode(saved[name], tensor)))
            else:
                self.say(f"the checkpoint has no state of '{name}', which stays as it is")
        self._passed = set(saved) - set(self.objects)
        for name in sorted(self._passed):
            self.say(f"the checkpoint has a state of '{name}', which this job does not track")


# ---------------------------------------------------------------- JSON and tensors


def encode(value: object, path: str, tensors: list[tuple[str, Tensor]]) -> object:
    """A state as JSON. Tensors and arrays go into `tensors`, under the names that stand for them.

    Args:
        path: of the value, for errors; up to its first dot the name of what is tracked.

    Raises:
        SaveError: something that only a pickle could hold.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        array = not isinstance(value, Tensor)
        key = f"{path.partition('.')[0]}/{len(tensors)}"
        tensors.append(
            (key, value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(cast(Array, value))))
        )
        return {"array" if array else "tensor": key}
    if isinstance(value, np.generic):
        return cast(object, value.item())
    if isinstance(value, list | tuple):
        parts = [encode(v, f"{path}.{i}", tensors) for i, v in enumerate(cast("Sequence[object]", value))]
        return {"list" if isinstance(value, list) else "tuple": parts}
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        pairs = [[encode(k, path, tensors), encode(v, f"{path}.{k}", tensors)] for k, v in items]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise SaveError(
        f"job.track: {path} is a {type(value).__name__}, which only a pickle could hold",
        cause="checkpoints hold tensors, arrays, numbers, strings, None, and lists, tuples and dicts of them",
        remedy=f"leave it out of the state_dict() of what is tracked as {path.partition('.')[0]}",
    )


def decode(coded: object, tensor: Callable[[str], Tensor]) -> object:
    """What `encode` was given. `tensor`: by its name."""
    if not isinstance(coded, Mapping):
        return coded
    ((kind, held),) = cast("Mapping[str, object]", coded).items()
    if kind in ("tensor", "array"):
        found = tensor(cast(str, held))
        return found if kind == "tensor" else found.numpy()
    parts = cast("Sequence[object]", held)
    if kind in ("list", "tuple"):
        values = [decode(part, tensor) for part in parts]
        return values if kind == "list" else tuple(values)
    made = {decode(k, tensor): decode(v, tensor) for k, v in cast("Sequence[tuple[object, object]]", parts)}
    return Counter(cast("dict[object, int]", made)) if kind == "counter" else made
