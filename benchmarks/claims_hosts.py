"""Four hosts of half a core each against one such host: the same global batch, the same final bits.

First speed alone, at 10 and at 1 Gbit/s. Then with a cap on every host's memory: the fastest plan that fits on one host
(plain PyTorch in smaller micro-batches, recomputing or not) against the fastest of ZeRO-3 that fits on four.

Note: caps. How much a plan needs is seen without a cap; under a cap the fastest of those that need less is the best
plan, so every cap between two needs has the same answer. One cap is then tried in earnest: the kernel kills a host that
needs more. Pages that a rank has from its parent (Python's and torch's code) are not on the host's bill.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from finding import Seen
from hosts_run import Job, Plan, Ran, Work, ran
from models import GPT, TRIAL, Sizes
from networks import ROOT, Unavailable
from resnet50 import ResNet50
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from tests.hosts import Host

HOSTS, CPUS = 4, 0.5
RATES = {"10 Gbit/s": 10e9, "1 Gbit/s": 1e9}
TARGET, MEMORY_TARGET = 3.6, 8.0
PLENTY = 12 << 30
"""A cap that nothing here reaches: it only counts."""
MIB = 1 << 20


def _each(draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]) -> Callable[[int, int, int], tuple[Tensor, Tensor]]:
    """Samples that depend on their number alone, whoever draws them."""

    def some(step: int, first: int, samples: int) -> tuple[Tensor, Tensor]:
        drawn = [draw(torch.Generator().manual_seed(100_000 * step + first + i)) for i in range(samples)]
        return torch.stack([x for x, _ in drawn]), torch.stack([y for _, y in drawn])

    return some


def gpt(name: str, sizes: Sizes, samples: int) -> Work:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = (torch.rand(sizes.context + 1, generator=generator) ** 3 * sizes.vocabulary).long()
        return tokens[:-1], tokens[1:]

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(scores.flatten(0, 1), targets.flatten())

    return Work(name=name, build=lambda: GPT(sizes), draw=_each(draw), loss=loss, samples=samples)


def images(name: str, build: Callable[[], ResNet50], side: int, samples: int) -> Work:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.randint(0, 10, (), generator=generator)
        return torch.randn(3, side, side, generator=generator) + label / 5 - 1, label

    return Work(name=name, build=build, draw=_each(draw), loss=cross_entropy, samples=samples)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is measured of one model. `parts`: into how many micro-batches a step may be cut where memory is scarce."""

    work: Work
    steps: int
    capped_samples: int
    parts: Sequence[int]


COURSES = (
    Course(work=images("resnet-50", ResNet50, 128, 64), steps=3, capped_samples=32, parts=(4, 8, 32)),
    Course(work=gpt("gpt-33m", Sizes(), 64), steps=3, capped_samples=32, parts=(4, 8, 32)),
)
QUICK = (
    Course(
        work=images("resnet-tiny", lambda: ResNet50((1, 1, 1, 1), (4, 8, 8, 16), 10), 64, 8),
        steps=1, capped_samples=8, parts=(4, 8),
    ),
    Course(work=gpt("gpt-tiny", TRIAL, 8), steps=1, capped_samples=8, parts=(4,)),
)  # fmt: skip


@contextmanager
def opened(count: int, rate: float, memory: int | None = None) -> Iterator[list[Host]]:
    """So many hosts of half a core.

    Raises:
        Unavailable: no root, no cgroups, ...
    """
    if ROOT not in sys.path:
        sys.path.append(ROOT)
    from tests import cgroups, hosts  # of this repository

    why = hosts.available() or (
        "" if cgroups.home("cpu") and cgroups.home("memory") else "no cgroups for cpu and memory"
    )
    if why:
        raise Unavailable(why)
    with hosts.hosts(count, hosts.Link(rate=rate), hosts.Limits(cpus=CPUS, memory=memory)) as made:
        yield made


class Report:
    """What was seen so far; every number is printed as it comes."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def __call__(self, case: str, metric: str, value: float, unit: str) -> None:
        self.seen.append(Seen(case=case, metric=metric, value=value, unit=unit))
        print(f"  {self.seen[-1]}", flush=True)


# ---------------------------------------------------------------- speed


def speed(course: Course, report: Report) -> None:
    """One host, four that do not talk, four that do."""
    name, job = course.work.name, Job(work=course.work, plan=Plan(strategy="ddp", parts=HOSTS), steps=course.steps)
    with opened(1, RATES["10 Gbit/s"]) as made:
        alone = _must(replace(job, hashed=True), made)
    report(f"{name}, one host", "step", alone.seconds, "s")
    for words, rate in RATES.items():
        with opened(HOSTS, rate) as made:
            if rate == max(RATES.values()):
                silent = _must(replace(job, plan=Plan(strategy="plain", parts=HOSTS)), made)
                report(f"{name}, {HOSTS} hosts, not talking", "factor", alone.seconds / silent.seconds, "times")
            best = 0.0
            for strategy in ("ddp", "zero1", "zero1 pending"):
                got = _must(replace(job, plan=Plan(strategy=strategy, parts=HOSTS), hashed=True), made)
                case, best = f"{name}, {HOSTS} hosts, {words}, {strategy}", max(best, alone.seconds / got.seconds)
                report(case, "step", got.seconds, "s")
                report(case, "factor", alone.seconds / got.seconds, "times")
                report(case, "same final bits", float(got.bits == alone.bits), "truth")
        print(
            f"{name}, {words}: {TARGET} x {'reached' if best >= TARGET else 'not reached'} ({best:.2f} x)", flush=True
        )


def _must(job: Job, made: Sequence[Host]) -> Ran:
    got = ran(job, made)
    assert got is not None, f"{job.plan} was killed without a cap"
    return got


# ---------------------------------------------------------------- memory


Known = Mapping[Plan, Ran]


def best(known: Known, cap: float) -> Plan | None:
    """The fastest of those that need no more."""
    fit = [plan for plan, seen in known.items() if seen.peak <= cap]
    return min(fit, key=lambda plan: known[plan].seconds, default=None)


def memory(course: Course, report: Report) -> None:
    """What each plan needs and takes; the factor at every cap; the factors that make it up."""
    work = replace(course.work, samples=course.capped_samples)
    job = Job(work=work, plan=Plan(strategy="plain", parts=HOSTS), steps=1)
    choices = [(parts, recompute) for parts in course.parts for recompute in (False, True)]
    one = {plan: _needs(replace(job, plan=plan), 1, report) for plan in _plans("plain", choices)}
    four = {plan: _needs(replace(job, plan=plan), HOSTS, report) for plan in _plans("zero3", choices)}
    reached = 0
    for cap in sorted({seen.peak for seen in (*one.values(), *four.values())}, reverse=True):
        single, many = best(one, cap), best(four, cap)
        if single and many:
            factor = told(work.name, cap, one, four, (single, many), report)
            reached = cap if factor >= MEMORY_TARGET and not reached else reached
    for hosts, known in ((1, one), (HOSTS, four)):
        report(_on(work, hosts), "least cap", min(seen.peak for seen in known.values()) / MIB, "MiB a host")
    where = f"at a cap of {reached / MIB:.0f} MiB" if reached else "at no cap"
    print(f"{work.name}: {MEMORY_TARGET:g} x {where}", flush=True)
    _in_earnest(job, one, four, report)


def _plans(strategy: str, choices: Sequence[tuple[int, bool]]) -> list[Plan]:
    return [Plan(strategy=strategy, parts=parts, recompute=recompute) for parts, recompute in choices]


def _on(work: Work, hosts: int) -> str:
    return f"{work.name}, {hosts} host{'s' * (hosts > 1)}"


def _needs(job: Job, hosts: int, report: Report) -> Ran:
    with opened(hosts, RATES["10 Gbit/s"], PLENTY) as made:
        got = _must(job, made)
    case = f"{_on(job.work, hosts)}, {job.plan}"
    report(case, "step", got.seconds, "s")
    report(case, "needs", got.peak / MIB, "MiB a host")
    return got


def told(name: str, cap: int, one: Known, four: Known, chosen: tuple[Plan, Plan], report: Report) -> float:
    """The whole factor and the factors that it is the product of."""
    single, many = chosen
    case = f"{name}, cap {cap / MIB:.0f} MiB"
    large, same = replace(single, parts=HOSTS, recompute=False), replace(single, recompute=False)
    whole = one[single].seconds / four[many].seconds
    parts = {
        "recomputation saved": one[single].seconds / one[same].seconds,
        "larger micro-batches": one[same].seconds / one[large].seconds,
        "hosts' efficiency": one[large].seconds / four[many].seconds / HOSTS,
    }
    print(f"{case}: {single} against {many}", flush=True)
    report(case, "factor", whole, "times")
    report(case, "hosts", HOSTS, "times")
    for words, value in parts.items():
        report(case, words, value, "times")
    return whole


def _in_earnest(job: Job, one: Known, four: Known, report: Report) -> None:
    """Both leanest plans under a cap between their needs: one of them is killed."""
    leanest = [min(known, key=lambda plan: known[plan].peak) for known in (one, four)]
    needs = [one[leanest[0]].peak, four[leanest[1]].peak]
    cap = round((min(needs) * max(needs)) ** 0.5)
    for plan, hosts, need in zip(leanest, (1, HOSTS), needs, strict=True):
        with opened(hosts, RATES["10 Gbit/s"], cap) as made:
            fits = ran(replace(job, plan=plan), made) is not None
        report(f"{_on(job.work, hosts)}, {plan}", f"fits in {cap / MIB:.0f} MiB", float(fits), "truth")
        print(f"    it needed {need / MIB:.0f} MiB", flush=True)


def measured(*, quick: bool, names: Sequence[str] | None) -> list[Seen]:
    """Both legs of every model.

    Raises:
        SystemExit: hosts cannot be made here, or there is no such model; says why.
    """
    report = Report()
    known = {course.work.name: course for course in (QUICK if quick else COURSES)}
    if names and not known.keys() >= set(names):
        raise SystemExit(f"--models {' '.join(names)}: there are {', '.join(known)}")
    courses = [known[name] for name in names or known]
    try:
        for course in courses:
            speed(course, report)
            memory(course, report)
    except Unavailable as why:
        raise SystemExit(f"hosts cannot be made here: {why}") from None
    return report.seen
