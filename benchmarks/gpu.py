"""One accelerator: what shoal adds to the plain loop, how much of the device is used, and what memory is needed.

    python benchmarks/gpu.py [--quick] [--json FILE]

Every case runs in fresh processes. `overhead`: the same float32 arithmetic with and without shoal. `use`: bfloat16 from
0.1 to 3 B parameters; MFU counts 6 floating-point operations per parameter and token and those of attention, against
the maker's dense bfloat16 rate. `shared`: two ranks on one device, through host memory. Every row shows peak memory
beside what `job.memory()` says is at rest. Exits with code 5 where torch finds no accelerator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from models import Sizes, gpt
from ranks import told_by_rank_0
from torch import nn

import shoal

NO_DEVICE = 5
WARM_UP = 3
PATIENCE = 900.0
RATES = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations a second that makers promise, by a word of the device's name."""
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run. `strategy` None: the plain loop. `ranks` share one device."""

    table: str
    name: str
    sizes: Sizes
    strategy: str | None
    precision: str = "float32"
    steps: int = 10
    ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Found:
    """Seconds of the median step; nats per token; bytes: the peak, and at rest by kind (of `job.memory()`)."""

    seconds: float
    loss: float
    parameters: int
    peak: int | None
    at_rest: dict[str, int]


SMALL = Sizes(width=768, layers=12, heads=12, vocabulary=32768, context=1024, batch=8)
MODELS = {
    "0.1 B": SMALL,
    "0.4 B": Sizes(width=1024, layers=24, heads=16, vocabulary=32768, context=1024, batch=8),
    "1.3 B": Sizes(width=2048, layers=24, heads=16, vocabulary=32768, context=1024, batch=8),
    "3 B": Sizes(width=2560, layers=36, heads=20, vocabulary=32768, context=1024, batch=4),
}


def cases(quick: bool) -> list[Case]:
    """All of them, in the order of the tables."""
    steps = 5 if quick else 20
    found = [
        Case(table="overhead", name=strategy or "plain loop", sizes=SMALL, strategy=strategy, steps=steps)
        for strategy in (None, "ddp", "zero1", "zero2", "zero3")
    ]
    for name in list(MODELS)[: 2 if quick else None]:
        found += [
            Case(
                table="use", name=f"{name} {strategy or 'plain loop'}", sizes=MODELS[name], strategy=strategy,
                precision="bfloat16", steps=steps,
            )
            for strategy in (None, "ddp", "zero3")
        ]  # fmt: skip
    found += [
        Case(table="shared", name=strategy, sizes=SMALL, strategy=strategy, steps=steps, ranks=2)
        for strategy in ("ddp", "zero3")
    ]
    return found


# ---------------------------------------------------------------- a rank


def run(case: Case, device: torch.device) -> Found:
    """Train in this process, which is one rank."""
    job = None
    if case.strategy is not None:
        job = shoal.init(case.strategy, device=device, precision=case.precision, run_dir="none", timeout=300.0)
    torch.manual_seed(0)
    task = gpt("gpt", "of any size", case.sizes)
    with device:
        model: nn.Module = task.build()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if job is not None:
        model, optimizer = job.prepare(model, optimizer)
    rank = job.rank if job is not None else 0
    took, losses, low = list[float](), list[float](), case.precision == "bfloat16" and job is None
    for step in range(WARM_UP + case.steps):
        tokens, targets = (t.to(device) for t in task.batch(step, rank))
        _settled(device)
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            loss = task.loss(model(tokens).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _settled(device)
        took.append(time.perf_counter() - begin)
        losses.append(loss.item())
    at_rest = dict(job.memory()) if job is not None else {}
    peak = None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
    if job is not None:
        job.close()
    return Found(
        seconds=statistics.median(took[WARM_UP:]), loss=losses[-1], parameters=parameters, peak=peak, at_rest=at_rest
    )


def _settled(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def visit(case: Case, device: str) -> Found:
    """Run a case in fresh processes; what rank 0 found."""
    command = [__file__, "--device", device, "--case", json.dumps(asdict(case))]
    return Found(**told_by_rank_0(command, case.ranks, PATIENCE, f"{case.table}, {case.name}"))


# ---------------------------------------------------------------- what is shown


def operations(sizes: Sizes, parameters: int) -> float:
    """Of one step: forward and backward; attention looks back only."""
    tokens = sizes.batch * sizes.context
    looked_up = (sizes.vocabulary + sizes.context) * sizes.width
    return tokens * (6 * (parameters - looked_up) + 6 * sizes.layers * sizes.context * sizes.width)


def line(case: Case, found: Found, plain: Found | None, rate: float | None) -> str:
    """One row of a table."""
    speed = operations(case.sizes, found.parameters) * case.ranks / found.seconds
    cells = [
        f"{case.name:20}", f"{found.seconds * 1e3:9.1f} ms",
        f"{found.seconds / plain.seconds:6.2f} x" if plain else f"{'':8}",
        f"{speed / 1e12:7.1f} TFLOP/s", f"{speed / rate:6.1%}" if rate and case.precision == "bfloat16" else f"{'':6}",
        f"peak {found.peak / GB:7.2f} GB" if found.peak else f"{'':15}",
        f"at rest {sum(found.at_rest.values()) / GB:7.2f} GB" if found.at_rest else "",
        f"loss {found.loss:.4f}",
    ]  # fmt: skip
    return "  ".join(cells)


def show(everything: Sequence[Case], device: str, rate: float | None) -> list[dict[str, object]]:
    """Run all cases and print a row for each as it comes."""
    rows: list[dict[str, object]] = []
    plain: Found | None = None
    table = ""
    for case in everything:
        if case.table != table:
            table = case.table
            print(f"\n{table}")
        found = visit(case, device)
        plain = found if case.strategy is None else plain
        print(line(case, found, plain if case.table != "shared" else None, rate), flush=True)
        rows.append({"case": asdict(case), "found": asdict(found)})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two models, few steps")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--device", default="", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if not asked.device and not torch.accelerator.is_available():
        print("benchmarks/gpu.py needs an accelerator such as CUDA, and torch finds none here", file=sys.stderr)
        return NO_DEVICE
    device = asked.device or str(torch.accelerator.current_accelerator())
    if asked.case:
        told = json.loads(asked.case)
        print(json.dumps(asdict(run(Case(**(told | {"sizes": Sizes(**told["sizes"])})), torch.device(device)))))
        return 0
    name = torch.get_device_module(device).get_device_name()
    rate = next((rate for word, rate in RATES.items() if word in name), None)
    print(f"{name}, torch {torch.__version__}, shoal {shoal.__version__}")
    rows = show(cases(asked.quick), device, rate)
    if asked.json:
        asked.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
