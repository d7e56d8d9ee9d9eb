"""How long a training step takes: shoal's strategies beside torch's own, on one host with 2 ranks.

    python benchmarks/step_time.py [--quick] [--json FILE]

A visit is one contender in fresh processes: some steps to warm up, then some that count. A round visits everybody, each
round begins with another contender, and ratios are taken within a round, so that a busy spell of the machine does not
fall on one contender alone. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
from contenders import CONTENDERS, ONE, Contender
from model import GPT, Sizes, batch_of, loss_of

WARM_UP = 2
"""Steps before those that count: shoal's first leaf and torch DDP's first step run without overlap."""
PATIENCE = 600.0
"""Seconds that a visit may take."""

N = TypeVar("N", int, float)


class Told(TypedDict):
    """What a rank says after a visit. Memory is in bytes above what the process had before it made its model.

    `machine`: seconds that all processors together were busy during the steps that count.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    machine: float | None
    loss: float
    at_rest: int | None
    peak: int | None


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One contender in one round. Seconds of the median step, nats per token, bytes of a rank.

    `elsewhere`: how many of the machine's processors were busy with other things meanwhile.
    """

    seconds: float
    cpu_seconds: float
    loss: float
    elsewhere: float | None
    at_rest: int | None
    peak: int | None


# ---------------------------------------------------------------- a rank


def _memory(field: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes, where the system says."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _machine() -> float | None:
    """Seconds that all processors of this machine have been busy, where the system says."""
    try:
        user, nice, system, _idle, _wait, *other = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    return sum(map(int, (user, nice, system, *other))) / os.sysconf("SC_CLK_TCK")


def _since(now: N | None, before: N | None) -> N | None:
    return None if now is None or before is None else now - before


def train(contender: Contender, sizes: Sizes, steps: int, rank: int, tell: Callable[[Told], None]) -> None:
    """The loop, the same for everybody."""
    seconds: list[float] = []
    cpu: list[float] = []
    losses: list[torch.Tensor] = []
    before, machine = _memory("VmRSS"), None
    with contender.open(sizes) as (model, optimizer):
        for step in range(WARM_UP + steps):
            tokens, targets = batch_of(sizes, step, rank)
            machine = _machine() if step == WARM_UP else machine
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = loss_of(model(tokens), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
            losses.append(loss.detach())
        tell(
            Told(
                seconds=seconds[WARM_UP:],
                cpu_seconds=cpu[WARM_UP:],
                machine=_since(_machine(), machine),
                loss=losses[-1].item(),
                at_rest=_since(_memory("VmRSS"), before),
                peak=_since(_memory("VmHWM"), before),
            )
        )


def _rank_main(contender: Contender, sizes: Sizes, steps: int, rank: int, port: int, answer: Connection) -> None:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        del os.environ[name]  # settings of the environment would win over the contender's
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": contender.ranks, "LOCAL_WORLD_SIZE": contender.ranks}
    os.environ |= {name: str(number) for name, number in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)

    def tell(told: Told) -> None:
        answer.send_bytes(json.dumps(told).encode())
        answer.poll(None)  # until it is killed: torch's process group now and then hangs when it is taken down

    train(contender, sizes, steps, rank, tell)


# ---------------------------------------------------------------- a visit


def visit(contender: Contender, sizes: Sizes, steps: int) -> Visit:
    """Let one contender train in processes of its own, which start as copies of this one: torch is imported already."""
    fork = multiprocessing.get_context("fork")
    port = _free_port()
    answers: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for rank in range(contender.ranks):
            answer, told = fork.Pipe()
            process = fork.Process(target=_rank_main, args=(contender, sizes, steps, rank, port, told), daemon=True)
            process.start()
            told.close()
            answers.append(answer)
            processes.append(process)
        ranks = _hear(answers, contender)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return _summed_up(ranks)


def _hear(answers: Sequence[Connection], contender: Contender) -> list[Told]:
    """What all ranks say; the first that fails ends the race."""
    heard: dict[int, Told] = {}
    while len(heard) < len(answers):
        silent = [answer for rank, answer in enumerate(answers) if rank not in heard]
        ready = wait(silent, PATIENCE)
        if not ready:
            raise SystemExit(f"{contender.name}: a rank said nothing for {PATIENCE:g} s")
        for rank, answer in enumerate(answers):
            if answer in ready:
                try:
                    heard[rank] = json.loads(answer.recv_bytes())
                except EOFError:
                    raise SystemExit(f"{contender.name}: rank {rank} failed, see above") from None
    return [heard[rank] for rank in sorted(heard)]


def _summed_up(ranks: Sequence[Told]) -> Visit:
    """A step ends when its slower rank ends; processor time, memory and loss are the mean over ranks."""
    steps = [max(step) for step in zip(*(told["seconds"] for told in ranks), strict=True)]
    cpu = [statistics.fmean(step) for step in zip(*(told["cpu_seconds"] for told in ranks), strict=True)]
    machine = ranks[0]["machine"]
    return Visit(
        seconds=statistics.median(steps),
        cpu_seconds=statistics.median(cpu),
        elsewhere=None if machine is None else max(0.0, machine - sum(cpu) * len(ranks)) / sum(steps),
        loss=statistics.fmean(told["loss"] for told in ranks),
        at_rest=_mean_bytes([told["at_rest"] for told in ranks]),
        peak=_mean_bytes([told["peak"] for told in ranks]),
    )


def _mean_bytes(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known)) if known else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- the race


Race = dict[str, list[Visit]]
"""Per contender its visits, one a round."""


class Measured(TypedDict):
    """One line of the JSON file."""

    bench: str
    case: str
    metric: str
    value: float
    unit: str


def race(contenders: Sequence[Contender], sizes: Sizes, rounds: int, steps: int) -> Race:
    """Rounds of visits; each round begins with another contender."""
    visits: Race = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            seen = visit(contender, sizes, steps)
            visits[contender.name].append(seen)
            print(f"round {number + 1} of {rounds}: {contender.name:30} {seen.seconds * 1e3:9.1f} ms", flush=True)
    return visits


def measured(visits: Race) -> list[Measured]:
    """Medians over rounds, with the smallest and the largest of what was seen."""
    lines: list[Measured] = []

    def add(case: str, metric: str, values: Sequence[float | None], unit: str, *, spread: bool = False) -> None:
        known = [value for value in values if value is not None]
        if not known:
            return
        found = {metric: statistics.median(known)}
        found |= {f"{metric}_min": min(known), f"{metric}_max": max(known)} if spread else {}
        lines.extend(Measured(bench="step_time", case=case, metric=m, value=v, unit=unit) for m, v in found.items())

    for case, seen in visits.items():
        add(case, "step", [v.seconds * 1e3 for v in seen], "ms", spread=True)
        ratios = [v.seconds / one.seconds for v, one in zip(seen, visits[ONE], strict=True)]
        add(case, "ratio", ratios, "one process", spread=True)
        add(case, "processor", [v.cpu_seconds * 1e3 for v in seen], "ms")
        add(case, "elsewhere", [v.elsewhere for v in seen], "processor")
        add(case, "memory_at_rest", [v.at_rest for v in seen], "byte")
        add(case, "memory_peak", [v.peak for v in seen], "byte")
        add(case, "final_loss", [v.loss for v in seen], "nat")
    return lines


COLUMNS = (
    ("step", "ms/step", 1.0, "9.1f"), ("step_min", "from", 1.0, "9.1f"), ("step_max", "to", 1.0, "9.1f"),
    ("ratio", "ratio", 1.0, "6.2f"), ("ratio_min", "from", 1.0, "6.2f"), ("ratio_max", "to", 1.0, "6.2f"),
    ("processor", "cpu ms", 1.0, "8.1f"), ("elsewhere", "others", 1.0, "6.2f"),
    ("memory_at_rest", "rest MiB", 2.0**-20, "9.1f"), ("memory_peak", "peak MiB", 2.0**-20, "9.1f"),
    ("final_loss", "loss", 1.0, "9.5f"),
)  # fmt: skip
"""Metric, heading, factor, format."""


def table(lines: Sequence[Measured]) -> str:
    """What was measured, the fastest first."""
    cases: dict[str, dict[str, float]] = {}
    for line in lines:
        cases.setdefault(line["case"], {})[line["metric"]] = line["value"]
    widths = {metric: int(form.partition(".")[0]) for metric, _, _, form in COLUMNS}
    rows = [" " * 30 + "".join(f" {heading:>{widths[metric]}}" for metric, heading, _, _ in COLUMNS)]
    for case, found in sorted(cases.items(), key=lambda item: item[1]["ratio"]):
        cells = [
            f"{found[metric] * factor:{form}}" if metric in found else f"{'-':>{widths[metric]}}"
            for metric, _, factor, form in COLUMNS
        ]
        rows.append(" ".join([f"{case:30}", *cells]))
    return "\n".join(rows)


# ---------------------------------------------------------------- the command line


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The time of a step: shoal beside torch, 2 ranks on one host.")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 steps instead of 5 rounds of 6")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--rounds", type=int, help="how often everybody is visited")
    parser.add_argument("--steps", type=int, help="steps of a visit that count")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="those whose name has one of these, and one process")
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name}", type=int, default=size.default, help="default %(default)s")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    rounds, steps = args.rounds or (2 if args.quick else 5), args.steps or (2 if args.quick else 6)
    sizes = Sizes(**{size.name: getattr(args, size.name) for size in fields(Sizes)})
    chosen = [c for c in CONTENDERS if not args.only or c.name == ONE or any(word in c.name for word in args.only)]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(sizes).parameters())
    lines = measured(race(chosen, sizes, rounds, steps))
    sizes_line = f"{parameters / 1e6:.1f} M parameters, {sizes.batch} x {sizes.context} tokens a rank, AdamW"
    print(f"\nGPT of {sizes_line}, 1 thread a rank, torch {torch.__version__}; {rounds} rounds x {steps} steps\n")
    print(table(lines))
    if args.json is not None:
        args.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
