"""Claims about time: contenders of the race, each visit in processes of its own, two ranks that share this host."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from contenders import CONTENDERS, ONE
from finding import Claim, Finding, Seen
from models import MODELS
from networks import Network, Place
from visit import Task, visit

RANKS = 2
ROUNDS, STEPS = 3, 3


def seconds(model: str, names: Sequence[str], quick: bool) -> dict[str, float]:
    """Of a step, by contender: the median over rounds of the median step of the slowest rank."""
    by_name = {contender.name: contender for contender in CONTENDERS}
    (chosen,) = (m for m in MODELS if m.name == model)
    found: dict[str, list[float]] = {name: [] for name in names}
    with Network(name="loopback", ranks=RANKS).opened() as place:
        for number in range(1 if quick else ROUNDS):
            for i in range(len(names)):
                name = names[(i + number) % len(names)]
                found[name].append(
                    _step(Task(contender=by_name[name], model=chosen, steps=1 if quick else STEPS), place)
                )
    return {name: median(times) for name, times in found.items()}


def _step(task: Task, place: Place) -> float:
    return max(median(told.get("seconds", [])) for told in visit(task, place))


def zero3_is_slower(quick: bool) -> Finding:
    names, seen, slower = ("shoal ddp", "shoal zero3", "torch DDP"), list[Seen](), list[bool]()
    for model in ("trial",) if quick else ("gpt-6m", "vgg", "embedding"):
        took = seconds(model, names, quick)
        for other in ("shoal ddp", "torch DDP"):
            ratio = took["shoal zero3"] / took[other]
            slower.append(ratio > 1)
            seen.append(Seen(case=f"{model}, {RANKS} ranks", metric=f"over {other}", value=ratio, unit="of its time"))
    return Finding(
        holds=all(slower),
        because="it sends half as much again, and on a slow network that shows. On one host a shared copy of the "
        "parameters is a look into memory, and each rank updates only its part",
        seen=seen,
    )


def linear_speed_up(quick: bool) -> Finding:
    names, seen, factors = (ONE, "shoal ddp", "torch DDP"), list[Seen](), list[float]()
    for model in ("trial",) if quick else ("gpt-6m", "resnet", "embedding", "layers"):
        took = seconds(model, names, quick)
        for name in names[1:]:
            factors.append(RANKS * took[ONE] / took[name])
            seen.append(
                Seen(case=f"{model}, {name}", metric=f"{RANKS} ranks against 1", value=factors[-1], unit="times")
            )
    return Finding(
        holds=min(factors) >= 0.98 * RANKS,
        because="gradients must be exchanged, and ranks of one host share its memory and caches: much computing per "
        "parameter scales, little does not",
        seen=seen,
    )


CLAIMS = (
    Claim(name="zero3-is-slower", words="ZeRO-3 is always slower", measure=zero3_is_slower),
    Claim(name="linear-speed-up", words="twice the workers are twice as fast", measure=linear_speed_up),
)
