"""Many architectures of `transformers`, tiny, trained under shoal and in plain PyTorch: the same bits?

    python benchmarks/zoo.py [--quick] [--only WORD ...] [--limit N] [--json FILE]

Each is trained for 3 steps of 2 leaves in plain PyTorch, twice, and under shoal's `ddp` and `zero3` with 2 ranks that
are threads. All parameters and buffers are compared bit by bit. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypedDict

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched: models start from random values

import torch
import transformers
import transformers.models.bert.modeling_bert  # what most architectures import, once for all processes
import transformers.models.llama.modeling_llama
from torch import Tensor, nn
from zoo_configs import Architecture, architectures, kind_of, make, tiny
from zoo_inputs import Feed, accepted, loss_of, parameters

import shoal
from shoal.comm.threads import run
from shoal.engine.units import choose

STEPS, LEAVES, RANKS = 3, 2, 2
STRATEGIES = ("ddp", "zero3")
PATIENCE = 40.0
"""Seconds that one architecture may take."""
SEED = 0
SMALLEST = 256
"""Parameters of a block that becomes a unit."""

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came of one architecture. `plain`: why it cannot be compared; `unequal`: per strategy, what is wrong."""

    name: str
    kind: str = "?"
    units: int = 0
    parameters: int = 0
    trained: int = 0
    seconds: float = 0.0
    plain: str = ""
    unequal: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def verdict(self) -> str:
        return "left out" if self.plain else "unequal" if self.unequal else "equal"


class Measured(TypedDict):
    """One line of the JSON file."""

    bench: str
    case: str
    metric: str
    value: float
    unit: str


# ---------------------------------------------------------------- training


def state_of(model: nn.Module, parameters_too: State) -> State:
    """All parameters and buffers, those that no checkpoint holds included."""
    return {**parameters_too, **{f"buffer {n}": b.clone() for n, b in model.named_buffers()}}


def plainly(new: Callable[[], nn.Module], feed: Feed, order: Sequence[int] = range(LEAVES)) -> State:
    """Without shoal: gradients of the leaves, added, divided, one step. Every leaf starts from the step's buffers.

    `order` is that in which leaves are computed. Only a model that remembers its last call can tell.
    """
    shoal.seed(SEED, 0)
    model = new()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        start = {n: b.clone() for n, b in model.named_buffers()}
        grads = [State()] * LEAVES
        buffers = [State()] * LEAVES
        for leaf in order:
            shoal.seed(SEED, step, leaf)
            loss_of(model(**feed.batch(step, leaf))).backward()
            grads[leaf] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            optimizer.zero_grad()
            buffers[leaf] = {n: b.clone() for n, b in model.named_buffers()}
            _set_buffers(model, start)
        _set_buffers(model, {n: _mean([b[n] for b in buffers]) for n in start})
        for name, p in model.named_parameters():
            if any(name in g for g in grads):
                p.grad = _mean([g.get(name, torch.zeros_like(p)) for g in grads])
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model, {n: p.detach().clone() for n, p in model.named_parameters()})


def _set_buffers(model: nn.Module, values: State) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(values[name])


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """Of two, in their dtype; whole numbers are the last one's."""
    if not parts[0].is_floating_point():
        return parts[-1]
    return (parts[0] + parts[1]) / len(parts) + 0.0


class Numbers(torch.utils.data.Dataset[int]):
    """Samples that are their own numbers."""

    def __len__(self) -> int:
        return STEPS * LEAVES

    def __getitem__(self, index: int) -> int:
        return index


def blocks(model: nn.Module) -> list[str]:
    """What shoal makes units of at full size: at this size it would find most of them too small."""
    return [name for name in choose(model, smallest=SMALLEST) if name]


def sharded(strategy: str, new: Callable[[], nn.Module], feed: Feed) -> list[State]:
    """Under shoal; what every rank has in the end."""

    def rank_main(_rank: int) -> State:
        with shoal.init(strategy, leaves=LEAVES, seed=SEED, run_dir="none", device="cpu") as job:
            shoal.seed(SEED, 0)
            model = new()
            model, optimizer = job.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), units=blocks(model))
            for number in job.loader(Numbers(), global_batch=LEAVES, shuffle=False):
                loss_of(model(**feed.batch(*divmod(int(number), LEAVES)))).backward()
                optimizer.step()
                optimizer.zero_grad()
            with job.whole(model):
                return state_of(model, {n: p.detach().clone() for n, p in model.named_parameters()})

    return run(RANKS, rank_main)


def difference(got: State, want: State) -> str:
    """The first tensor in which two states differ; empty if none does."""
    if list(got) != list(want):
        return "other names of parameters or buffers"
    for name, value in want.items():
        if got[name].dtype != value.dtype or not torch.equal(_bits(got[name]), _bits(value)):
            apart = (got[name].double() - value.double()).abs().max().item()
            return f"'{name}' differs by up to {apart:.1e}"
    return ""


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


# ---------------------------------------------------------------- one architecture


def examined(architecture: Architecture) -> Found:
    """Build, train, compare."""
    begin = time.perf_counter()
    told: dict[str, object] = {"name": architecture.name}
    try:
        config = tiny(architecture)
        told["kind"] = kind_of(architecture, config)
        shoal.seed(SEED, 0)
        model = make(architecture, config)
        told["units"], told["parameters"] = len(blocks(model)) + 1, parameters(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        feed = accepted(model, config)
        new = lambda: make(architecture, config)  # noqa: E731
        want = plainly(new, feed)
        told["trained"] = sum(p.numel() for n, p in before.items() if not torch.equal(p, want[n]))
        again = difference(plainly(new, feed), want)
        turned = difference(plainly(new, feed, range(LEAVES)[::-1]), want)
    except Exception as e:
        return Found(**told, plain=_line(e), seconds=time.perf_counter() - begin)
    if again or turned:
        why = f"differs from itself: {again}" if again else f"remembers the order of its calls: {turned}"
        return Found(**told, plain=why, seconds=time.perf_counter() - begin)
    unequal: dict[str, str] = {}
    for strategy in STRATEGIES:
        try:
            found = next((d for s in sharded(strategy, new, feed) if (d := difference(s, want))), "")
        except Exception as e:
            found = _line(e)
        if found:
            unequal[strategy] = found
    return Found(**told, unequal=unequal, seconds=time.perf_counter() - begin)


def _line(e: BaseException) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


def _child(architecture: Architecture, answer: Connection) -> None:
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        found = examined(architecture)
    answer.send_bytes(json.dumps(asdict(found)).encode())


def visit(architecture: Architecture) -> Found:
    """Examine it in a process of its own: some crash, hang, or change torch for all others."""
    fork = multiprocessing.get_context("fork")
    answer, told = fork.Pipe()
    process = fork.Process(target=_child, args=(architecture, told), daemon=True)
    process.start()
    told.close()
    try:
        if not answer.poll(PATIENCE):
            return Found(name=architecture.name, plain=f"took longer than {PATIENCE:g} s")
        return Found(**json.loads(answer.recv_bytes()))
    except EOFError:
        return Found(name=architecture.name, plain="its process crashed")
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------- the command line


def row(found: Found) -> str:
    """One line of the table."""
    verdicts = " ".join(f"{'-' if found.plain else 'no' if s in found.unequal else 'yes':>5}" for s in STRATEGIES)
    why = found.plain or "; ".join(f"{s}: {r}" for s, r in found.unequal.items())
    numbers = f"{found.units:5} {found.parameters:>9,} {found.trained:>9,}"
    return f"{found.name:32} {found.kind:19} {numbers} {verdicts}  {why[:180]}".rstrip()


HEADING = f"{'architecture':32} {'kind':19} units {'param.':>9} {'trained':>9} " + " ".join(
    f"{s:>5}" for s in STRATEGIES
)


def summary(all_found: Sequence[Found]) -> str:
    """How many are equal, by kind, and how many are not."""
    counts = Counter(f.verdict for f in all_found)
    kinds = Counter(f.kind for f in all_found if f.verdict == "equal")
    by_kind = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return (
        f"{counts['equal']} architectures with equal bits under {' and '.join(STRATEGIES)} ({by_kind}); "
        f"{counts['unequal']} unequal or refused; {counts['left out']} not trained in plain PyTorch"
    )


def measured(all_found: Sequence[Found]) -> list[Measured]:
    lines: list[Measured] = []
    for f in all_found:
        values: dict[str, tuple[float, str]] = {"parameters": (f.parameters, "parameter"), "seconds": (f.seconds, "s")}
        if not f.plain:
            values |= {f"equal_{s}": (float(s not in f.unequal), "yes or no") for s in STRATEGIES}
            values |= {"trained": (f.trained, "parameter"), "units": (f.units, "unit")}
        lines += [Measured(bench="zoo", case=f.name, metric=m, value=v, unit=u) for m, (v, u) in values.items()]
    return lines


QUICK = (
    "albert", "bart", "bert", "convnext", "deepseek_v3", "gemma3_text", "gpt2", "llama", "mamba", "mixtral", "resnet",
    "swin", "t5", "vit", "wav2vec2", "whisper",
)  # fmt: skip


def chosen(args: argparse.Namespace) -> list[Architecture]:
    everyone = architectures()
    if args.only:
        names = {a.name for a in everyone}
        everyone = [a for a in everyone if any(w == a.name or (w not in names and w in a.name) for w in args.only)]
    elif args.quick:
        everyone = [a for a in everyone if a.name in QUICK]
    return everyone[: args.limit]


def main() -> int:
    parser = argparse.ArgumentParser(description="Architectures of transformers: shoal's bits beside plain PyTorch's.")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} of them, of every kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="those of this name, or with this in their name")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N")
    args = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        del os.environ[name]  # settings of the environment would win
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    all_found: list[Found] = []
    print(HEADING)
    for architecture in chosen(args):
        all_found.append(visit(architecture))
        print(row(all_found[-1]), flush=True)
    print(f"\n{summary(all_found)} (torch {torch.__version__}, transformers {transformers.__version__})")
    if args.json is not None:
        args.json.write_text(json.dumps(measured(all_found), indent=1) + "\n")
    return int(any(f.verdict == "unequal" for f in all_found))


if __name__ == "__main__":
    raise SystemExit(main())
